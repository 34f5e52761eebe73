"""UTF-8 text as raw `bytes`: whether it is text, and where it can be cut."""


def is_text(text):
    """Returns whether `bytes` are valid UTF-8 without NUL characters."""
    if b"\0" in text:
        return False
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def cut_text(text, num_bytes):
    """Returns the first `num_bytes` bytes of UTF-8 text, without cutting a character in two.

    A character that would be cut is left out: the result is then up to 3 bytes shorter.
    """
    if len(text) <= num_bytes:
        return text
    while num_bytes and text[num_bytes] & 0xC0 == 0x80:  # a continuation byte
        num_bytes -= 1
    return text[:num_bytes]


def cut_between_lines(text):
    """Returns text up to its last line end, or up to its last whole character if it has none.

    A tokenizer hardly notices a cut at a line end.
    """
    end = text.rfind(b"\n") + 1
    return text[:end] or cut_text(text, len(text) - 1) or text


def character_start(file, position):
    """Returns where the character of a UTF-8 file starts that holds the byte at `position`.

    Args:
        file: binary file; its own position is moved.
        position: int, in bytes.
    """
    back = min(position, 3)  # a character has at most 4 bytes
    file.seek(position - back)
    before = file.read(back + 1)
    return position - back + len(cut_text(before, back))
