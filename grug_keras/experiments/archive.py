"""`docs/archive.md` as data: the entries, and the edits that commands make to them."""

import dataclasses
import re

from grug_keras.experiments.repository import ARCHIVE
from grug_keras.results import write_atomically

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
PENDING = "pending"  # of a commit that has no name yet, and of a verdict
BUCKETS = ("attention", "block", "mlp", "loss", "optimizer")
_HEADING = "## Experiments"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One experiment of the archive.

    Attributes:
        id: str.
        line: int, of its heading, from 1.
        fields: dict of name -> value.
        lines: dict of name -> line of the field.
    """

    id: str
    line: int
    fields: dict
    lines: dict

    @property
    def path(self):
        """The script, relative to the repository, or None."""
        return self.fields.get("Path", "").strip("`") or None

    @property
    def status(self):
        """Of `STATUSES`, if the entry is right."""
        return self.fields.get("Status")

    @property
    def buckets(self):
        """What it says that it changes: a set of `BUCKETS`, empty for `none`."""
        names = {name.strip() for name in self.fields.get("Bucket", "").split(",")}
        return names - {"none", ""}


class Archive:
    """The archive of a checkout, its text and its entries.

    Args:
        repository: `Repository`.

    Attributes:
        entries: dict of id -> `Entry`, in the order of the file.
        problems: list of `(line, id, sentence)`, of what cannot be read.
    """

    def __init__(self, repository):
        self.file = repository.root / ARCHIVE
        self._parse(self.file.read_text(encoding="utf-8"))

    def _parse(self, text):
        self.text, self.entries, self.problems = text, {}, []
        fenced, within, entry = False, False, None
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("```"):
                fenced = not fenced
            if fenced:
                continue
            if line.startswith("## "):
                within = line == _HEADING
            elif within and line.startswith("### "):
                entry = Entry(line[4:].strip(), number, {}, {})
                if entry.id in self.entries:
                    first = self.entries[entry.id].line
                    self.problems.append(
                        (number, entry.id, f"the id is that of line {first} too: rename one")
                    )
                else:
                    self.entries[entry.id] = entry
            elif within and line.startswith("- "):
                self._field(entry, number, line)

    def _field(self, entry, number, line):
        match = re.fullmatch(r"- ([A-Z][\w -]*?): (.*\S)\s*", line)
        if entry is None or match is None or match[1] not in FIELDS:
            name = entry.id if entry else "no entry"
            self.problems.append(
                (number, name, f"{line!r} is no field: write '- <field>: <value>', "
                 f"a field being {', '.join(FIELDS)}")
            )  # fmt: skip
        elif match[1] in entry.fields:
            self.problems.append((number, entry.id, f"{match[1]} is given twice: keep one"))
        else:
            entry.fields[match[1]], entry.lines[match[1]] = match[2], number

    def find(self, name):
        """The entry of an id or of a script's path.

        Raises:
            ValueError: names the ids that there are.
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
        """Adds an entry, in the order of the ids, and writes the file."""
        lines = self.text.rstrip("\n").split("\n")
        after = [entry.line for entry in self.entries.values() if entry.id > name]
        at = min(after, default=len(lines) + 2) - 1
        block = [f"### {name}", *(f"- {f}: {fields[f]}" for f in FIELDS if f in fields), ""]
        if not after:
            lines, block = [*lines, ""], block[:-1]
        self._parse("\n".join([*lines[:at], *block, *lines[at:]]) + "\n")
        self._write()

    def set(self, name, **values):
        """Sets fields of an entry and writes the file; None takes a field away.

        Args:
            name: str, id.
            **values: by the fields' names, `_` for a space: `Superseded_by="core"`.
        """
        for key, value in values.items():
            lines = self.text.rstrip("\n").split("\n")
            field = next(f for f in FIELDS if re.sub(r"\W", "_", f) == key)
            entry = self.entries[name]
            if field in entry.lines:
                lines[entry.lines[field] - 1 : entry.lines[field]] = (
                    [] if value is None else [f"- {field}: {value}"]
                )
            elif value is not None:
                before = [entry.lines[f] for f in FIELDS[: FIELDS.index(field)] if f in entry.lines]
                lines.insert(max(before, default=entry.line), f"- {field}: {value}")
            self._parse("\n".join(lines) + "\n")
        self._write()

    def _write(self):
        write_atomically(self.file, lambda path: path.write_text(self.text, encoding="utf-8"))
