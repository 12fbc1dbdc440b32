"""What is changed: each mutant is one source file with one small piece of text replaced.

Comparisons, off-by-one constants, sums, minima, conjunctions, negations, checks and arguments: what
a slip of the hand would get wrong. Comments, messages and annotations are left alone.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        path: the file, from the root of the repository.
        start: where the replaced text begins in the file.
        right: the text that stands there.
        wrong: what replaces it.
        line: the line where it begins, counted from 1.
    """

    path: str
    start: int
    right: str
    wrong: str
    line: int

    def apply(self, source: str) -> str:
        """The file with the change."""
        end = self.start + len(self.right)
        assert source[self.start : end] == self.right, f"{self.path} is no longer what it was"
        return source[: self.start] + self.wrong + source[end:]

    def __str__(self) -> str:
        right, wrong = (" ".join(text.split()) for text in (self.right, self.wrong))
        return f"{self.path}:{self.line}: {right} -> {wrong or '(nothing)'}"


def of(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in its order."""
    find = _in_python if path.endswith(".py") else _in_cc
    found = {
        Mutant(path, start, source[start:end], wrong, source.count("\n", 0, start) + 1)
        for start, end, wrong in find(source)
    }
    return sorted(found, key=lambda mutant: (mutant.start, mutant.wrong))


Change = tuple[int, int, str]  # where the text begins and ends, and what replaces it

OPERATORS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+",
    "*": "+", "//": "*", "/": "*", "%": "//", "&": "|", "|": "&", "and": "or", "or": "and",
    "&&": "||", "||": "&&", "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all",
    "all": "any", "pmax": "pmin", "ceil": "floor", "cumsum": "cumprod", "True": "False",
    "False": "True",
}  # fmt: skip


def _in_python(source: str) -> Iterator[Change]:
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        def at(line: int, column: int) -> int:  # columns count bytes
            text = source[lines[line - 1] : lines[line]]
            return lines[line - 1] + len(text.encode()[:column].decode())

        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def operator(left: ast.AST, right: ast.AST) -> Iterator[Change]:
        begin, end = span(left)[1], span(right)[0]
        gap = re.sub(r"#.*", lambda comment: " " * len(comment[0]), source[begin:end])
        found = re.search(r"not in|is not|[^\s()]+", gap)
        if found and found[0] in OPERATORS:
            yield begin + found.start(), begin + found.end(), OPERATORS[found[0]]

    def walk(node: ast.AST) -> Iterator[Change]:
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return  # it tells of what is not so anywhere
        begin_end = span(node) if hasattr(node, "lineno") else (0, 0)
        begin, end = begin_end
        match node:
            case ast.JoinedStr() | ast.Assert():
                return
            case ast.Compare():
                terms = [node.left, *node.comparators]
                for left, right in itertools.pairwise(terms):
                    yield from operator(left, right)
            case ast.BinOp():
                yield from operator(node.left, node.right)
            case ast.BoolOp():
                for left, right in itertools.pairwise(node.values):
                    yield from operator(left, right)
            case ast.AugAssign():
                sign = source.rindex("=", begin, span(node.value)[0]) - 1
                if source[sign] in OPERATORS:
                    yield sign, sign + 1, OPERATORS[source[sign]]
            case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub()):
                yield begin, span(node.operand)[0], ""
            case ast.Constant(value=bool()):
                yield begin, end, NAMES[source[begin:end]]
            case ast.Constant(value=int()):
                yield begin, end, str(node.value + 1)
            case ast.Raise():
                yield begin, end, "pass"
            case ast.Expr(value=ast.Call()):
                yield begin, end, "pass"
            case ast.Name(id=name) if name in NAMES:
                yield begin, end, NAMES[name]
            case ast.Attribute(attr=name) if name in NAMES:
                yield end - len(name), end, NAMES[name]
        if isinstance(node, ast.Call):
            for keyword in (k for k in node.keywords if k.arg != "strict"):
                where = span(keyword)
                comma = re.match(r"\s*,", source[where[1] :])
                yield where[0], where[1] + (comma.end() if comma else 0), ""
        for name, field in ast.iter_fields(node):
            if name in ("annotation", "returns", "exc"):
                continue
            for child in field if isinstance(field, list) else [field]:
                if isinstance(child, ast.AST):
                    yield from walk(child)

    yield from walk(ast.parse(source))


# Comments, includes, strings and characters hold no code; nor does what is known at compile time.
_SILENT = re.compile(
    r"//[^\n]*|/\*.*?\*/|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\])'"
    r"|^[ \t]*template <[^\n]*|static_assert\([^;]*;",
    re.MULTILINE | re.DOTALL,
)
# clang-format puts spaces around these, and none inside template brackets.
_BINARY = re.compile(r"(?<= )(<=|>=|==|!=|&&|\|\||[<>+*/%-])(?=[ \n])")
_INTEGER = re.compile(r"(?<![\w.])\d+(?![\w.])")
_NOT = re.compile(r"(?<![\w)\]])!(?=[\w(])")
_CALL = re.compile(r"\b(min|max)(?=[<(])")
_FLAG = re.compile(r"\b(true|false)\b")
_CHECK = re.compile(
    r"^[ \t]*((?:\w+(?:\.|->))?(?:That|Type|Shape|Rank|NotEmpty|at_most|ReadMaps)\()", re.MULTILINE
)
_RETURN = re.compile(r"^[ \t]*(if \([^{}]*?\) (?:return\b|continue|break)[^;{}]*;)", re.MULTILINE)
_INCREMENT = re.compile(r"([+-])=")


def _in_cc(source: str) -> Iterator[Change]:
    code = _SILENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), source)
    for found in _BINARY.finditer(code):
        # What Python divides by begins a comment here.
        yield found.start(), found.end(), "/" if found[0] == "%" else OPERATORS[found[0]]
    for found in _INTEGER.finditer(code):
        yield found.start(), found.end(), str(int(found[0]) + 1)
    for found in _INCREMENT.finditer(code):
        yield found.start(1), found.end(1), OPERATORS[found[1]]
    for found in _NOT.finditer(code):
        yield found.start(), found.end(), ""
    for found in _CALL.finditer(code):
        yield found.start(), found.end(), NAMES[found[0]]
    for found in _FLAG.finditer(code):
        yield found.start(), found.end(), "false" if found[0] == "true" else "true"
    for found in _CHECK.finditer(code):
        end = code.find(";", found.start(1))
        # Not the function's own definition.
        if code[found.start(1) : end].count("{") == code[found.start(1) : end].count("}"):
            yield found.start(1), end + 1, ";"
    for found in _RETURN.finditer(code):
        yield found.start(1), found.end(1), ";"
