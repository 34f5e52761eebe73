"""How text is read from files and records: what a person chooses beside the place itself."""

import codecs
import dataclasses

ON_BAD_RECORD = ("fail", "skip")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How text is read from files and records.

    Args:
        text_field: str or None, the field of records that holds the text; `"a.b"` is the field b
            of the field a. None is the field `text`, or the only one that holds text.
        encoding: str, of text files and JSON. A byte order mark is no text.
        on_bad_record: str. `"fail"` names the first record without text and ends; `"skip"`
            leaves such records out and counts them.
        deduplicate: bool, whether a document whose text came before is left out.

    Raises:
        ValueError: names the argument and the value.
    """

    text_field: str | None = None
    encoding: str = "utf-8"
    on_bad_record: str = "fail"
    deduplicate: bool = False

    def __post_init__(self):
        if self.text_field is not None and not all(self.text_field.split(".")):
            raise ValueError(
                f"text_field must name a field, as in text or a.b, got {self.text_field!r}"
            )
        try:
            codecs.lookup(self.encoding).incrementaldecoder(errors="strict")
            is_text = codecs.lookup(self.encoding)._is_text_encoding
        except (LookupError, TypeError):
            is_text = False
        if not is_text:
            raise ValueError(f"encoding must be one that Python knows, got {self.encoding!r}")
        if self.on_bad_record not in ON_BAD_RECORD:
            raise ValueError(
                f"on_bad_record must be {' or '.join(ON_BAD_RECORD)}, got {self.on_bad_record!r}"
            )
