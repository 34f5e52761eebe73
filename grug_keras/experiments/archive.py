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
        problems: list of `(line, id, sentence)` for each line that cannot be read.
    """

    def __init__(self, checkout):
        self.file = checkout.root / ARCHIVE
        self._parse(self.file.read_text(encoding="utf-8"))

    def _parse(self, text):
        self.text, self.entries, self.problems = text, {}, []
        in_code_block, in_experiments, entry = False, False, None
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("```"):
                in_code_block = not in_code_block
            if in_code_block:
                continue
            if line.startswith("## "):
                in_experiments = line == _HEADING
            elif in_experiments and line.startswith("### "):
                entry = self._parse_heading(number, line)
            elif in_experiments and line.startswith("- "):
                self._parse_field(entry, number, line)

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
        match = re.fullmatch(r"- ([A-Z][\w -]*?): (.*\S)\s*", line)
        if entry is None or match is None or match[1] not in FIELDS:
            sentence = f"{line!r} is not a field: write '- <field>: <value>', with one of the "
            sentence += f"fields {', '.join(FIELDS)}"
            self.problems.append((number, entry.id if entry else "no entry", sentence))
        elif match[1] in entry.fields:
            self.problems.append((number, entry.id, f"{match[1]} is given twice: keep one"))
        else:
            entry.fields[match[1]], entry.lines[match[1]] = match[2], number

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
        index = min(later, default=len(lines) + 2) - 1
        block = [f"### {name}", *(f"- {f}: {fields[f]}" for f in FIELDS if f in fields), ""]
        if not later:
            lines, block = [*lines, ""], block[:-1]
        self._parse("\n".join([*lines[:index], *block, *lines[index:]]) + "\n")
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
                lines[number - 1 : number] = [] if value is None else [f"- {field}: {value}"]
            elif value is not None:
                before = [entry.lines[f] for f in FIELDS[: FIELDS.index(field)] if f in entry.lines]
                lines.insert(max(before, default=entry.line), f"- {field}: {value}")
            self._parse("\n".join(lines) + "\n")
        self._write()

    def _write(self):
        write_atomically(self.file, lambda path: path.write_text(self.text, encoding="utf-8"))
