"""PTX text -> functions, variables and statements; decode.py gives them their meaning."""

import bisect
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from .errors import PtxError, UnknownInstructionError

_TOKEN = re.compile(
    r"""
    (?P<skip>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<string>"[^"]*")
  | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?
              |\d+\.\d+(?:[eE][+-]?\d+)?|\d+U?)
  | (?P<word>[%$.A-Za-z_][\w$.%]*(?:::[\w.]+)*)
  | (?P<punctuation>[-+@!{}()\[\],;:|<>=])
    """,
    re.VERBOSE | re.DOTALL,
)
# What separates tokens, for showing a statement on one line.
_GAP = re.compile(r"(?:\s|//[^\n]*)+")
# Directives that end with their line, and debug sections: nothing in them is executed.
_LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(?:loc|file|version|target|address_size)\b[^\n]*", re.MULTILINE)
_SECTION = re.compile(r"^[ \t]*\.section\b[^{]*\{[^}]*\}", re.MULTILINE)

SPACES = ("global", "const", "shared", "local", "param")
SIZES = {f"{k}{n}": n // 8 for k in "busf" for n in (8, 16, 32, 64)} | {"pred": 1, "b128": 16}


@dataclass(frozen=True)
class Name:
    """A register, variable, label or function."""

    text: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A literal: an integer, or the bits of a float literal with its type ("f32" or "f64")."""

    value: int
    kind: str = ""


@dataclass(frozen=True)
class Address:
    """[base + offset]; `base` is a register or variable, or None for a literal address."""

    base: str | None
    offset: int


@dataclass(frozen=True)
class Group:
    """Several operands in one place: {a, b} (vector), a|b (pair) or (a, b) (call)."""

    form: str
    items: tuple["Operand", ...]


Operand = Name | Immediate | Address | Group


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    line: int
    text: str
    guard: Name | None = None


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Targets:
    """label: .branchtargets a, b, ...;"""

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Scope:
    """{ opens a scope, } closes it."""

    opens: bool


@dataclass(frozen=True)
class Registers:
    kind: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Variable:
    """A variable or parameter. `count` bytes; None for an unsized extern array (dynamic shared memory)."""

    name: str
    space: str
    kind: str
    align: int
    nbytes: int | None
    array: bool
    initial: bytes = b""


Statement = Instruction | Label | Targets | Scope | Registers | Variable


@dataclass
class Function:
    name: str
    entry: bool
    parameters: list[Variable]
    results: list[Variable]
    directives: dict[str, tuple[int, ...]]
    body: list[Statement] | None = None


@dataclass
class Source:
    functions: dict[str, Function] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


def parse(text: str) -> Source:
    """Read a PTX module. Raises PtxError with the line for anything that is not understood."""
    return _Parser(text).module()


def _blank(match: re.Match[str]) -> str:
    return "\n" * match.group().count("\n")


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.text = _SECTION.sub(_blank, _LINE_DIRECTIVE.sub("", text))
        self.tokens = list(self._tokens(self.text))
        self.at = 0

    def _tokens(self, text: str) -> Iterator[tuple[str, str, int, int]]:
        starts = [m.start() for m in re.finditer("\n", text)]
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            line = bisect.bisect_left(starts, position) + 1
            if match is None:
                raise UnknownInstructionError(f"PTX line {line}: cannot read {self.lines[line - 1].strip()!r}")
            if match.lastgroup != "skip":
                yield match.lastgroup or "", match.group(), line, position
            position = match.end()

    # Tokens.

    @property
    def token(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    @property
    def line(self) -> int:
        return self.tokens[min(self.at, len(self.tokens) - 1)][2]

    def next(self) -> str:
        token = self.token
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.token == token:
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.error(f"expected {token!r}, got {self.token!r}")

    def error(self, problem: str) -> PtxError:
        return UnknownInstructionError(f"PTX line {self.line}: {problem} in {self.lines[self.line - 1].strip()!r}")

    def number(self) -> Immediate:
        sign = -1 if self.accept("-") else 1
        if self.at < len(self.tokens) and self.tokens[self.at][0] != "number":
            raise self.error(f"expected a number, got {self.token!r}")
        text = self.next()
        if text[:2] in ("0f", "0F", "0d", "0D"):
            kind, top = ("f32", 31) if text[1] in "fF" else ("f64", 63)
            return Immediate(int(text[2:], 16) ^ ((1 << top) if sign < 0 else 0), kind)
        if "." in text:
            return Immediate(int.from_bytes(struct.pack("<d", sign * float(text)), "little"), "f64")
        return Immediate(sign * int(text.rstrip("U"), 0))

    # Modules.

    def module(self) -> Source:
        source = Source()
        while self.token:
            while self.token in (".visible", ".extern", ".weak", ".common"):
                self.at += 1
            if self.token in (".entry", ".func"):
                function = self.function(self.next() == ".entry")
                known = source.functions.get(function.name)
                if known is None or known.body is None:  # a declaration may come before its definition
                    source.functions[function.name] = function
            elif self.token[1:] in SPACES:
                source.variables += self.variables()
            elif self.accept(";"):
                pass
            else:
                raise self.error(f"unknown directive {self.token!r}")
        return source

    def function(self, entry: bool) -> Function:
        results = self.parameters() if self.token == "(" else []
        name = self.next()
        parameters = self.parameters() if self.token == "(" else []
        directives: dict[str, tuple[int, ...]] = {}
        while self.token not in ("{", ";"):
            directive = self.next()
            values: list[int] = []
            while self.tokens[self.at][0] == "number":
                values.append(self.number().value)
                self.accept(",")
            directives[directive] = tuple(values)
        function = Function(name, entry, parameters, results, directives)
        if not self.accept(";"):
            function.body = self.body()
        return function

    def parameters(self) -> list[Variable]:
        self.expect("(")
        out: list[Variable] = []
        while not self.accept(")"):
            out += self.variables(end=False)
            self.accept(",")
        return out

    def variables(self, end: bool = True) -> list[Variable]:
        """.space [.align n] [.ptr .space .align n] .type name[n][m] = initial, ... ;"""
        space, align, kind = self.next()[1:], 0, ""
        if space == "reg":
            raise self.error("register parameters are not supported:")
        while self.token.startswith("."):
            word = self.next()[1:]
            if word == "align":
                align = align or self.number().value
            elif word == "ptr":  # says where the pointer points, not how the parameter lies
                while self.token in (".global", ".const", ".shared", ".local", ".align"):
                    if self.next() == ".align":
                        self.number()
            elif word in SIZES:
                kind = word
            else:
                raise self.error(f"unknown type .{word}")
        out = []
        while True:
            out.append(self.variable(space, kind, align))
            if not end or not self.accept(","):
                break
        if end:
            self.expect(";")
        return out

    def variable(self, space: str, kind: str, align: int) -> Variable:
        name = self.next()
        dimensions: list[int | None] = []
        while self.accept("["):
            dimensions.append(None if self.token == "]" else self.number().value)
            self.expect("]")
        sized = [d for d in dimensions if d is not None]
        nbytes = None if None in dimensions else SIZES[kind] * prod(sized)
        initial = self.initial(kind) if self.accept("=") else b""
        return Variable(name, space, kind, max(align, SIZES[kind]), nbytes, bool(dimensions), initial)

    def initial(self, kind: str) -> bytes:
        if not self.accept("{"):
            return (self.number().value & (1 << 8 * SIZES[kind]) - 1).to_bytes(SIZES[kind], "little")
        out = b""
        while not self.accept("}"):
            out += self.initial(kind)
            self.accept(",")
        return out

    # Bodies.

    def body(self) -> list[Statement]:
        self.expect("{")
        out: list[Statement] = []
        depth = 1
        while depth:
            if not self.token:
                raise self.error("the function does not end")
            if self.accept("{"):
                depth += 1
                out.append(Scope(True))
            elif self.accept("}"):
                depth -= 1
                out.append(Scope(False))
            else:
                out += self.statement()
        return out[:-1]

    def statement(self) -> list[Statement]:
        if self.accept(";"):
            return []
        if self.token == ".reg":
            return [self.registers()]
        if self.token[1:] in SPACES and self.token.startswith("."):
            return list(self.variables())
        if self.token in (".pragma", ".callprototype", ".calltargets"):
            self.skip_statement()
            return []
        if self.tokens[self.at + 1][1] == ":":
            name = self.next()
            self.next()
            if not self.accept(".branchtargets"):
                return [Label(name)]
            labels = [self.next()]
            while self.accept(","):
                labels.append(self.next())
            self.expect(";")
            return [Targets(name, tuple(labels))]
        return [self.instruction()]

    def skip_statement(self) -> None:
        while self.next() != ";":
            pass

    def registers(self) -> Registers:
        self.next()
        kind = self.next()[1:]
        names: list[str] = []
        while True:
            name = self.next()
            if self.accept("<"):
                names += [f"{name}{i}" for i in range(self.number().value)]
                self.expect(">")
            else:
                names.append(name)
            if not self.accept(","):
                break
        self.expect(";")
        return Registers(kind, tuple(names))

    def instruction(self) -> Instruction:
        line, start = self.line, self.tokens[self.at][3]
        guard = None
        if self.accept("@"):
            negated = self.accept("!")
            guard = Name(self.next(), negated)
        if self.tokens[self.at][0] != "word":
            raise self.error(f"expected an instruction, got {self.token!r}")
        opcode = self.next()
        operands: list[Operand] = []
        while not self.accept(";"):
            operands.append(self.operand())
            if self.token != ";":
                self.expect(",")
        text = _GAP.sub(" ", self.text[start : self.tokens[self.at - 1][3]])
        return Instruction(opcode, tuple(operands), line, text, guard)

    def operand(self) -> Operand:
        first = self.single()
        if self.accept("|"):
            return Group("pair", (first, self.single()))
        return first

    def single(self) -> Operand:
        if self.accept("!"):
            return Name(self.next(), True)
        if self.accept("{"):
            return self.group("vector", "}")
        if self.accept("("):
            return self.group("call", ")")
        if self.accept("["):
            return self.address()
        kind = self.tokens[self.at][0]
        if self.token == "-" or kind == "number":
            return self.number()
        if kind != "word":
            raise self.error(f"expected an operand, got {self.token!r}")
        return Name(self.next())

    def group(self, form: str, close: str) -> Group:
        items: list[Operand] = []
        while not self.accept(close):
            items.append(self.single())
            self.accept(",")
        return Group(form, tuple(items))

    def address(self) -> Address:
        base = None if self.tokens[self.at][0] == "number" else self.next()
        offset = 0 if base else self.number().value
        while self.token in ("+", "-"):
            if self.token == "+":
                self.next()
            offset += self.number().value
        self.expect("]")
        return Address(base, offset)
