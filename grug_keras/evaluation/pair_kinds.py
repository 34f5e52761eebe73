"""Places in Python source where one small change makes a mistake of a known kind."""

import ast
import functools
import io
import keyword
import re
import tokenize
from typing import NamedTuple

ITEM_BYTES = 127  # of an item: with the document start they fit into the context of `smoke`
_TAIL_BYTES = 24
_NO_CODE = (
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.NL),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
)
_CLOSED_BY = {"(": ")", "[": "]", "{": "}"}
_KEYWORDS = {}
for _word in keyword.kwlist:
    if _word.islower():
        _KEYWORDS.setdefault(len(_word), []).append(_word)
# A header alone is no statement: it follows another one.
_FOLLOWS = {"else": "if x: pass\n", "elif": "if x: pass\n"}
_FOLLOWS |= {"except": "try: pass\n", "finally": "try: pass\n"}


class Place(NamedTuple):
    """A place in a file, and what would be wrong there.

    Args:
        kind: str.
        file: str, name of the file.
        before: bytes, the text up to it, at most a window.
        right, wrong: bytes. `wrong` is None until a partner is found for the place.
        after: bytes, the rest of the line.
    """

    kind: str
    file: str
    before: bytes
    right: bytes
    wrong: bytes | None
    after: bytes


class SourceFile:
    """A parsed file.

    Args:
        name: str.
        text: bytes, Python source.

    Raises:
        SyntaxError, ValueError: for what this Python cannot parse.
    """

    def __init__(self, name, text):
        self.name, self.text = name, text
        self.tree = ast.parse(text)
        self.lines = [0]
        for line in text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    @functools.cached_property
    def words(self):
        """The identifiers of the file, a set of bytes."""
        return set(re.findall(rb"[A-Za-z_]\w*", self.text))

    def tokens(self):
        """Yields its tokens, each with the position in bytes where it starts."""
        for token in tokenize.tokenize(io.BytesIO(self.text).readline):
            if token.line.isascii():
                yield token, self.lines[token.start[0] - 1] + token.start[1]

    def place(self, kind, start, right, wrong=None, seen=None):
        """Returns the `Place` at a position, or None if what it depends on is out of its window.

        Args:
            kind: str.
            start: int, position in bytes.
            right, wrong: bytes.
            seen: bytes, a word, or int, a position, that must be in the window; None for nothing.
        """
        stop = start + len(right)
        if self.text[start:stop] != right:
            return None
        end = self.text.find(b"\n", stop) + 1 or len(self.text)
        after = self.text[stop : min(end, stop + _TAIL_BYTES)]
        begin = max(0, start - (ITEM_BYTES - len(after) - max(len(right), len(wrong or right))))
        if begin:  # at the start of a line, where one is near
            begin = self.text.find(b"\n", begin - 1, start) + 1 or begin
        before = self.text[begin:start]
        if isinstance(seen, bytes):
            if not re.search(rb"\b" + re.escape(seen) + rb"\b", before):
                return None
        elif seen is not None and seen < begin:
            return None
        return Place(kind, self.name, before, right, wrong, after)


def brackets(file, rng):
    """Yields closing brackets: another kind would not match the opening one."""
    opened = []
    for token, start in file.tokens():
        if token.string in _CLOSED_BY and token.type == tokenize.OP:
            opened.append(start)
        elif token.string in _CLOSED_BY.values() and token.type == tokenize.OP and opened:
            others = [other for other in _CLOSED_BY.values() if other != token.string]
            right, wrong = token.string.encode(), rng.choice(others).encode()
            yield file.place("bracket", start, right, wrong, opened.pop())


def quotes(file, rng):
    """Yields closing quotes: the other kind would not end the string."""
    for token, start in file.tokens():
        if token.type == tokenize.STRING and token.start[0] == token.end[0]:
            quote = token.string[-1]
            if token.string[-3:] != 3 * quote and token.string.isascii():
                end, wrong = start + len(token.string) - 1, "'" if quote == '"' else '"'
                yield file.place("quote", end, quote.encode(), wrong.encode(), start)


def indents(file, rng):
    """Yields indentations: one level more after a colon, the same after a whole statement."""
    last_row, last_depth, depth, after_colon, at_start = 0, 0, 0, False, True
    for token, start in file.tokens():
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if token.type == tokenize.INDENT else -1
        if token.type in _NO_CODE:
            continue
        if at_start and token.start == (last_row + 1, 4 * depth) and last_row:
            less, same, more = (b"    " * (depth + i) for i in (-1, 0, 1))
            if after_colon or depth == last_depth:
                yield file.place("indent", start - 4 * depth, same, less if after_colon else more)
        at_start = token.type == tokenize.NEWLINE
        if at_start:
            last_row, last_depth = token.start[0], depth
        else:
            after_colon = token.string == ":"


def keywords(file, rng):
    """Yields keywords: another one of the same length is a syntax error there."""
    line = []
    for token, start in file.tokens():
        if token.type == tokenize.NEWLINE:
            yield from _keywords_of(file, rng, line, start)
            line = []
        elif token.type not in _NO_CODE:
            line.append((token, start))


def _keywords_of(file, rng, line, end):
    if not line or end - line[0][1] > ITEM_BYTES:
        return
    begin = line[0][1]
    text = file.text[begin:end].decode()
    lead = _FOLLOWS.get(line[0][0].string, "")
    tail = " pass" if text.rstrip().endswith(":") else ""
    if not text.isascii() or not _is_statement(lead + text + tail):
        return
    for token, start in line:
        others = [w for w in _KEYWORDS.get(len(token.string), ()) if w != token.string]
        others = [w for w in others if w not in _FOLLOWS]  # right or wrong by the line above
        if token.string not in keyword.kwlist or not others:
            continue
        wrong, offset = rng.choice(others), start - begin
        changed = text[:offset] + wrong + text[offset + len(wrong) :]
        if not _is_statement(lead + changed + tail):
            yield file.place("keyword", start, token.string.encode(), wrong.encode())


def _is_statement(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def names(file, rng):
    """Yields uses of names that a function defines; what is wrong is a name that is not there."""
    seen = set()
    for function in ast.walk(file.tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        inside = list(ast.walk(function))
        defined = {node.arg for node in inside if isinstance(node, ast.arg)}
        defined |= {n.id for n in inside if isinstance(n, ast.Name) and _is_store(n)}
        for node in inside:
            if isinstance(node, ast.Name) and not _is_store(node) and node.id in defined:
                start = file.lines[node.lineno - 1] + node.col_offset
                if start not in seen and len(node.id) > 1:
                    seen.add(start)
                    name = node.id.encode()
                    yield file.place("name", start, name, seen=name)


def _is_store(node):
    return isinstance(node.ctx, ast.Store)


def attributes(file, rng):
    """Yields attributes of `self` that were there before; wrong is one that is not in the file."""
    for node in ast.walk(file.tree):
        owner = node.value if isinstance(node, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id == "self":
            name = node.attr.encode()
            start = file.lines[node.end_lineno - 1] + node.end_col_offset - len(name)
            yield file.place("attribute", start, name, seen=b"self." + name)


def argument_orders(file, rng):
    """Yields the first two arguments of calls, which would be wrong the other way round."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call) or len(node.args) < 2:
            continue
        first, second = node.args[:2]
        if not all(isinstance(a, ast.Name | ast.Attribute | ast.Constant) for a in (first, second)):
            continue
        if first.lineno != second.end_lineno:
            continue
        line = file.lines[first.lineno - 1]
        ends = (first.col_offset, first.end_col_offset, second.col_offset, second.end_col_offset)
        a, a_end, b, b_end = (line + end for end in ends)
        text = file.text
        wrong = text[b:b_end] + text[a_end:b] + text[a:a_end]
        if text[a_end:b] == b", " and wrong != text[a:b_end] and b_end - a < ITEM_BYTES // 2:
            yield file.place("argument order", a, text[a:b_end], wrong)


KINDS = {
    "bracket": brackets,
    "quote": quotes,
    "indent": indents,
    "keyword": keywords,
    "name": names,
    "attribute": attributes,
    "argument order": argument_orders,
}
