"""Opens files for reading, also compressed ones: gzip, bzip2, xz and Zstandard."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib

ENDINGS = (".gz", ".bz2", ".xz", ".zst")
_MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_BZ2 = re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)")  # text may begin with BZh
_ERRORS = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
_BLOCK = 2**16


class NoTextError(ValueError):
    """A file that is not text of the encoding that was named."""


class DamagedError(ValueError):
    """A file that cannot be decompressed to its end."""


def compression(path):
    """Returns the ending of `ENDINGS` that says how a file is compressed, or None.

    The first bytes count, also in a file whose name says nothing; the name counts in a file that
    does not begin as it should, which then is damaged.
    """
    with open(path, "rb") as file:
        start = file.read(10)
    if _BZ2.match(start):
        return ".bz2"
    for magic, ending in _MAGIC.items():
        if start.startswith(magic):
            return ending
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)


def plain_name(path):
    """Returns the name of a file in lower case without the ending of its compression."""
    name = path.name.lower()
    return next((name[: -len(e)] for e in ENDINGS if name.endswith(e)), name)


@contextlib.contextmanager
def open_bytes(data, path):
    """Opens a file for reading bytes, decompressed on the way.

    Args:
        data: str, what the user asked for, for error messages.
        path: `pathlib.Path`.

    Raises:
        ValueError: if it is damaged, also while it is read within the `with`.
    """
    how = compression(path)
    try:
        with contextlib.ExitStack() as stack:
            if how is None:
                file = open(path, "rb")  # noqa: SIM115 - the stack closes it
            elif how == ".zst":
                import pyarrow as pa

                file = io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
            else:
                file = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[how](path, "rb")
            yield stack.enter_context(file)
    except _ERRORS as error:
        raise DamagedError(f"data={data!r}: {path} is damaged: {error}") from None
    except OSError as error:
        if how is None or error.errno is not None:  # the disk's own
            raise
        raise DamagedError(f"data={data!r}: {path} is damaged: {error}") from None


@contextlib.contextmanager
def open_utf8(data, path, encoding):
    """Opens a text file of any encoding for reading UTF-8 bytes, without a byte order mark.

    Args:
        data, path: as of `open_bytes`.
        encoding: str, of the file.

    Raises:
        ValueError: as `open_bytes`, and if the file is not of that encoding. UTF-8 is not checked.
    """
    with open_bytes(data, path) as file:
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        if not is_utf8:
            file = io.BufferedReader(_Recoded(file, encoding))
        else:
            file = io.BufferedReader(file)
        try:
            if is_utf8 and file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise NoTextError(f"data={data!r}: {path} is UTF-16: name its encoding (utf-16)")
            if file.peek(3).startswith(codecs.BOM_UTF8):
                file.read(3)
            yield file
        except UnicodeDecodeError as error:
            raise NoTextError(f"data={data!r}: {path} is not {encoding} text: {error}") from None


class _Recoded(io.RawIOBase):
    """A binary file of some encoding, read as UTF-8."""

    def __init__(self, file, encoding):
        self._file, self._left = file, b""
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._left:
            block = self._file.read(_BLOCK)
            self._left = self._decoder.decode(block, final=not block).encode("utf-8")
            if not block and not self._left:
                return 0
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
