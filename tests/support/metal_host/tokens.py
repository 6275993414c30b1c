"""Metal source as tokens: enough structure to find declarations and rewrite them."""

import re
from dataclasses import dataclass

ADDRESS_SPACES = frozenset({"device", "constant", "threadgroup", "thread"})

_TOKEN = re.compile(
    r"""(?P<line>^\#[^\n]*\n)
    | (?P<space>[ \t\r\f\v]+|\n)
    | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    | (?P<name>[A-Za-z_]\w*)
    | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    | (?P<operator><<=|>>=|->\*|\.\.\.|::|->|\+\+|--|<<|>=|<=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.M | re.S | re.X,
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass
class Token:
    """A piece of text; kind is line (a `#` line), space, string, name, number or operator."""

    kind: str
    text: str

    @property
    def blank(self) -> bool:
        return self.kind in ("space", "line")


class Tokens:
    """A preprocessed source. Positions are indices; spans are half-open."""

    def __init__(self, text: str):
        self.list = [Token(m.lastgroup, m.group()) for m in _TOKEN.finditer(text)]

    def __len__(self) -> int:
        return len(self.list)

    def __getitem__(self, at: int) -> str:
        return self.list[at].text

    def copy(self) -> "Tokens":
        other = Tokens("")
        other.list = [Token(token.kind, token.text) for token in self.list]
        return other

    def text(self, begin: int = 0, end: int | None = None) -> str:
        return "".join(token.text for token in self.list[begin:end])

    def kind(self, at: int) -> str:
        return self.list[at].kind

    def after(self, at: int) -> int:
        """The next token that is not blank."""
        at += 1
        while at < len(self.list) and self.list[at].blank:
            at += 1
        return at

    def before(self, at: int) -> int:
        """The previous token that is not blank, -1 when there is none."""
        at -= 1
        while at >= 0 and self.list[at].blank:
            at -= 1
        return at

    def opens(self, at: int) -> bool:
        return self.list[at].kind == "operator" and self[at] in _CLOSING

    def closing(self, at: int) -> int:
        """Where the bracket at `at` closes."""
        opened, closed = self[at], _CLOSING[self[at]]
        depth = 0
        for here in range(at, len(self.list)):
            depth += (self[here] == opened) - (self[here] == closed)
            if depth == 0:
                return here
        raise ValueError(f"unbalanced {opened} near {self.text(max(0, at - 20), at + 20)!r}")

    def after_template(self, at: int) -> int:
        """The token after the `>` that closes the `<` at `at`."""
        depth = 0
        while at < len(self.list):
            if self.opens(at):
                at = self.closing(at)
            depth += (self[at] == "<") - (self[at] == ">")
            at += 1
            if depth == 0:
                return at
        raise ValueError("unbalanced <")

    def attribute_spans(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The `[[ ... ]]` in a span."""
        spans = []
        at = begin
        while at < end:
            if self[at] == "[" and self.after(at) < end and self[self.after(at)] == "[":
                spans.append((at, self.closing(at) + 1))
                at = spans[-1][1]
            else:
                at += 1
        return spans

    def attributes(self, begin: int, end: int) -> dict[str, str | None]:
        """The attributes in a span: `[[buffer(0)]]` is `{"buffer": "0"}`."""
        found = {}
        for start, stop in self.attribute_spans(begin, end):
            words = self.words(start, stop)[2:-2]
            while words:
                name = words.pop(0)
                if words[:1] == ["("]:
                    size = _balanced(words)
                    found[name] = "".join(words[1 : size - 1])
                    words = words[size:]
                elif name not in (",", "::"):
                    found[name] = None
        return found

    def words(self, begin: int, end: int, attributes: bool = True) -> list[str]:
        """The texts of a span without blanks, and without attributes if so asked."""
        hidden = set()
        if not attributes:
            for start, stop in self.attribute_spans(begin, end):
                hidden.update(range(start, stop))
        return [
            token.text
            for at, token in enumerate(self.list[begin:end], begin)
            if not token.blank and at not in hidden
        ]

    def erase(self, begin: int, end: int) -> None:
        """Blank a span; lines stay where they are."""
        for at in range(begin, end):
            if self.list[at].kind != "line":
                self.list[at] = Token("space", "\n" * self[at].count("\n"))

    def replace(self, at: int, text: str) -> None:
        self.list[at] = Token("name", text)


def _balanced(words: list[str]) -> int:
    """How many words the parenthesis that opens `words` spans."""
    depth = 0
    for size, word in enumerate(words, 1):
        depth += (word == "(") - (word == ")")
        if depth == 0:
            return size
    raise ValueError("unbalanced ( in an attribute")
