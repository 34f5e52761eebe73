"""UTF-8 text as raw `bytes`: where it can be cut."""

import re

_LONE_SPACE = re.compile(rb"(?<=\S) (?=\S)")
_LAST_BYTES = 2**16  # of a text, in which a place to cut it is looked for


def cut_text(text, num_bytes):
    """Returns the first `num_bytes` bytes of UTF-8 text, without cutting a character in two.

    A character that would be cut is left out: the result is then up to 3 bytes shorter.
    """
    if len(text) <= num_bytes:
        return text
    while num_bytes and text[num_bytes] & 0xC0 == 0x80:  # a continuation byte
        num_bytes -= 1
    return text[:num_bytes]


def cut_between_words(text):
    """Returns text up to a place near its end that tokenizers do not tokenize across.

    That is before a space between two words: the usual tokenizers begin a token there, whatever
    comes before or after. Text without one is cut after its last line end, or else after its
    last whole character.
    """
    begin = max(0, len(text) - _LAST_BYTES)
    spaces = [space.start() for space in _LONE_SPACE.finditer(text, begin)]
    end = spaces[-1] if spaces else text.rfind(b"\n") + 1
    return text[:end] or cut_text(text, len(text) - 1) or text


def cut_in_parts(text, num_bytes):
    """Yields text in parts of at most `num_bytes` bytes; see `cut_between_words`."""
    start = 0
    while len(text) - start > num_bytes:
        part = cut_between_words(text[start : start + num_bytes])
        yield part
        start += len(part)
    yield text[start:]
