"""Reads and edits `docs/archive.md`, the list of all experiments."""

import dataclasses
import re

from grug_keras.data.files import write_atomically
from grug_keras.experiments.checkout import ARCHIVE

FIELDS = (
    "Path",
    "Bucket",
    "Introduced",
    "Last known-good",
    "Status",
    "Purpose",
    "Result",
    "Verdict",
    "Notes",
    "Superseded by",
    "Issue",
)
REQUIRED = ("Path", "Bucket", "Introduced", "Status", "Purpose", "Verdict")
STATUSES = ("active", "superseded", "deleted")
PENDING = "pending"  # a commit that does not exist yet, or a verdict that is not measured yet
BUCKETS = ("attention", "block", "mlp", "loss", "optimizer")
_HEADING = "## Experiments"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The entry of one experiment.

    Attributes:
        id: str.
        line: int, line number of its heading, from 1.
        fields: dict of field name -> value.
        lines: dict of field name -> line number.
    """

    id: str
    line: int
    fields: dict
    lines: dict

    @property
    def path(self):
        """The path of the script, relative to the checkout, or None."""
        return self.fields.get("Path", "").strip("`") or None

    @property
    def status(self):
        """The Status field, or None. A valid entry has one of `STATUSES`."""
        return self.fields.get("Status")

    @property
    def buckets(self):
        """The buckets that the experiment says it changes, a set; empty for `none`."""
        names = {name.strip() for name in self.fields.get("Bucket", "").split(",")}
        return names - {"none", ""}


class Archive:
    """The archive of a checkout.

    Args:
        checkout: `Checkout`.

    Attributes:
        text: str, the content of the file.
        entries: dict of id -> `Entry`, in the order of the file.
        end: int, line number after the last one of the section of the entries.
        problems: list of `(line, id, sentence)` for each line that cannot be read.
    """

    def __init__(self, checkout):
        self.file = checkout.root / ARCHIVE
        self._parse(self.file.read_text(encoding="utf-8"))

    def _parse(self, text):
        self.text, self.entries, self.problems, self.end = text, {}, [], None
        in_code_block, in_experiments, entry, field = False, False, None, None
        for number, line in enumerate(text.split("\n"), 1):
            if line.startswith("```"):
                in_code_block = not in_code_block
            if in_code_block:
                continue
            if line.startswith(("# ", "## ")):
                if in_experiments:
                    self.end = number
                in_experiments, entry, field = line.rstrip() == _HEADING, None, None
            elif in_experiments and line.startswith("### "):
                entry, field = self._parse_heading(number, line), None
            elif in_experiments and field and _continues(line):
                entry.fields[field] += f" {line.strip()}"
            elif not line.strip():
                field = None
            elif in_experiments and (entry or line.startswith("- ")):
                field = self._parse_field(entry, number, line)
        self.end = self.end or len(text.rstrip("\n").split("\n")) + 1

    def _parse_heading(self, number, line):
        entry = Entry(line[4:].strip(), number, {}, {})
        if entry.id in self.entries:
            first = self.entries[entry.id].line
            sentence = f"line {first} has the same id: rename one of them"
            self.problems.append((number, entry.id, sentence))
        else:
            self.entries[entry.id] = entry
        return entry

    def _parse_field(self, entry, number, line):
        """Reads the first line of a field; returns its name, or None if it is none."""
        match = re.fullmatch(r"- ([A-Z][\w -]*?): (.*\S)\s*", line)
        if entry is None or match is None or match[1] not in FIELDS:
            sentence = f"{line!r} is not a field: write '- <field>: <value>', with one of the "
            sentence += f"fields {', '.join(FIELDS)}"
            self.problems.append((number, entry.id if entry else "no entry", sentence))
        elif match[1] in entry.fields:
            self.problems.append((number, entry.id, f"{match[1]} is given twice: keep one"))
        else:
            entry.fields[match[1]], entry.lines[match[1]] = match[2], number
            return match[1]
        return None

    def find(self, name):
        """Finds the entry of an experiment.

        Args:
            name: str, the id of the entry or the path of the script.

        Returns:
            `Entry`.

        Raises:
            ValueError: if there is no such entry; it lists the ids that exist.
        """
        if name in self.entries:
            return self.entries[name]
        path = str(name).removeprefix("./")
        for entry in self.entries.values():
            if entry.path and path == entry.path:
                return entry
        raise ValueError(
            f"{ARCHIVE} has no entry {name!r}; it has {', '.join(self.entries) or 'none'}. "
            "`grug new` makes one"
        )

    def add(self, name, fields):
        """Adds an entry, keeping the ids in alphabetical order, and writes the file.

        Args:
            name: str, id.
            fields: dict of field name -> value.
        """
        lines = self.text.rstrip("\n").split("\n")
        later = [entry.line for entry in self.entries.values() if entry.id > name]
        index = min(later, default=self.end) - 1
        block = [f"### {name}", *(f"- {f}: {fields[f]}" for f in FIELDS if f in fields)]
        before = [] if not lines[index - 1].strip() else [""]
        after = [""] if lines[index:] else []
        self._parse("\n".join([*lines[:index], *before, *block, *after, *lines[index:]]) + "\n")
        self._write()

    def set(self, name, **values):
        """Sets fields of an entry and writes the file.

        Args:
            name: str, id.
            **values: field name -> value, with `_` for a space or a hyphen in the name, as in
                `Superseded_by="core"`. None removes the field.
        """
        for key, value in values.items():
            lines = self.text.rstrip("\n").split("\n")
            field = next(f for f in FIELDS if re.sub(r"\W", "_", f) == key)
            entry = self.entries[name]
            if field in entry.lines:
                number = entry.lines[field]
                last = _last_line(lines, number)
                lines[number - 1 : last] = [] if value is None else [f"- {field}: {value}"]
            elif value is not None:
                before = [entry.lines[f] for f in FIELDS[: FIELDS.index(field)] if f in entry.lines]
                last = _last_line(lines, max(before)) if before else entry.line
                lines.insert(last, f"- {field}: {value}")
            self._parse("\n".join(lines) + "\n")
        self._write()

    def _write(self):
        write_atomically(self.file, lambda path: path.write_text(self.text, encoding="utf-8"))


def _continues(line):
    """Whether a line goes on with the field before it, as Markdown has it."""
    return bool(line.strip()) and not re.match(r"[-*+] |#|```", line)


def _last_line(lines, number):
    """Returns the number of the last line of the field that begins at line `number`."""
    while number < len(lines) and _continues(lines[number]):
        number += 1
    return number
