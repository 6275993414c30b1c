"""What a Metal source declares: kernels, function constants, threadgroup variables."""

import math
import re
from dataclasses import dataclass

from .tokens import ADDRESS_SPACES, Tokens

# Attributes of kernel parameters, and how include/metal_host/binding.h names them.
_BUILT_IN = {
    "thread_position_in_grid": "kPositionInGrid",
    "thread_position_in_threadgroup": "kPositionInThreadgroup",
    "threadgroup_position_in_grid": "kThreadgroupPosition",
    "threads_per_threadgroup": "kThreadsPerThreadgroup",
    "dispatch_threads_per_threadgroup": "kThreadsPerThreadgroup",
    "threadgroups_per_grid": "kThreadgroupsPerGrid",
    "threads_per_grid": "kThreadsPerGrid",
    "thread_index_in_threadgroup": "kIndexInThreadgroup",
    "thread_index_in_simdgroup": "kLane",
    "simdgroup_index_in_threadgroup": "kSimdgroup",
    "simdgroups_per_threadgroup": "kNumSimdgroups",
    "dispatch_simdgroups_per_threadgroup": "kNumSimdgroups",
    "threads_per_simdgroup": "kThreadsPerSimdgroup",
    "thread_execution_width": "kThreadsPerSimdgroup",
    "quadgroup_index_in_threadgroup": "kQuadgroup",
    "thread_index_in_quadgroup": "kLaneInQuadgroup",
}
_NAME = re.compile(r"[A-Za-z_]\w*$")


@dataclass
class Parameter:
    """A kernel parameter. `condition` names the function constant it depends on, if any;
    `is_written`: memory of the device that is not const."""

    name: str
    binding: str
    index: int = 0
    condition: str | None = None
    is_written: bool = False

    @property
    def is_buffer(self) -> bool:
        return self.binding in ("kBuffer", "kUniform")


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    max_threads: int | None


@dataclass
class FunctionConstant:
    """`constant <type> <name> [[function_constant(<id>)]];` at `span`."""

    name: str
    type: str
    id: int
    span: tuple[int, int]


@dataclass
class _Item:
    """A declaration of a namespace or class: its span, and the braces of its body."""

    begin: int
    end: int
    body: tuple[int, int] | None


class Declarations:
    """The declarations of a preprocessed source.

    Attributes:
        tokens: The source, as it was.
        kernels: Kernel functions by name, templates included.
        instances: Host name to the C++ expression that names the kernel.
        constants: Function constants by name.
        variables: Spans of `threadgroup` variables, from the word to the semicolon.
        explicit: Spans of explicit kernel instantiations.
        repeats: Spans of functions that repeat an earlier one but for address spaces.
        plain_kernels: Where each kernel that is no template begins.
        methods: The `)` of each method's parameters that no address space follows:
            one for objects in thread memory. Constructors are not among them.
    """

    def __init__(self, preprocessed: str):
        self.tokens = Tokens(preprocessed)
        self.kernels: dict[str, Kernel] = {}
        self.instances: dict[str, str] = {}
        self.constants: dict[str, FunctionConstant] = {}
        self.explicit: list[tuple[int, int]] = []
        self.repeats: list[tuple[int, int]] = []
        self.plain_kernels: list[int] = []
        self.methods: list[int] = []
        self._read_scope(0, len(self.tokens))
        self.variables = self._find_variables()

    def resolve(self, name: str) -> tuple[str, Kernel]:
        """A host name, kernel name or template id to its C++ expression and kernel.

        Raises:
            ValueError: There is no such kernel.
        """
        expression = self.instances.get(name, name)
        base = expression.split("<")[0].strip().split("::")[-1].strip()
        if base not in self.kernels:
            known = ", ".join(sorted(set(self.kernels) | set(self.instances)))
            raise ValueError(f"[run] kernel must be one of {known}; got {name}.")
        return expression, self.kernels[base]

    def _read_scope(self, begin: int, end: int, class_name: str | None = None) -> None:
        seen = set()
        for item in list(self._items(begin, end)):
            words = self.tokens.words(item.begin, item.end)
            kind = self._kind(item)
            if kind in ("namespace", "extern"):
                self._read_scope(item.body[0] + 1, item.body[1])
            elif words[0] == "template" and words[1] != "<":
                self._read_instance(item, words)
            elif not item.body and "function_constant" in words:
                self._read_constant(item)
            elif self._repeats(item, kind, words, seen):
                self.repeats.append((item.begin, item.end))
            else:
                if kind == "class":
                    self._read_scope(item.body[0] + 1, item.body[1], self._class_name(item))
                if kind == "function" and class_name:
                    self._read_method(item, class_name)
                if item.body and "kernel" in self.tokens.words(item.begin, item.body[0]):
                    self._read_kernel(item)

    def _items(self, begin: int, end: int):
        """Split a scope at its declarations."""
        tokens = self.tokens
        at = tokens.after(begin - 1)
        while at < end:
            if tokens[at] in ("public", "private", "protected"):
                at = tokens.after(tokens.after(at))
                continue
            item = self._item(at, end)
            if tokens.words(item.begin, item.end) != [";"]:
                yield item
            at = tokens.after(item.end - 1)

    def _item(self, begin: int, end: int) -> _Item:
        tokens = self.tokens
        at, body = begin, None
        initialised = False  # after the `=` of a variable
        initialising = False  # after the `:` of a constructor
        while at < end:
            text = tokens[at]
            if text == ";":
                return _Item(begin, at + 1, body)
            if text == "template" and tokens[tokens.after(at)] == "<":
                at = tokens.after_template(tokens.after(at))
                continue
            if text == "=" and tokens[tokens.before(at)] != "operator":
                initialised = True
            if text == ":" and tokens[tokens.before(at)] == ")":
                initialising = True
            if tokens.opens(at):
                closed = tokens.closing(at)
                is_member = initialising and (
                    tokens.kind(tokens.before(at)) == "name" or tokens[tokens.before(at)] == ">"
                )
                if text == "{" and not initialised and not is_member:
                    body = (at, closed)
                    if self._kind(_Item(begin, closed, body)) in (
                        "namespace",
                        "extern",
                        "function",
                    ):
                        return _Item(begin, closed + 1, body)
                at = closed
            at += 1
        return _Item(begin, end, body)

    def _kind(self, item: _Item) -> str:
        """namespace, extern, class, enum, function, or declaration (no body)."""
        if not item.body:
            return "declaration"
        head = self.tokens.words(self._after_templates(item.begin), item.body[0])
        if "namespace" in head[:2]:
            return "namespace"
        if head[:1] == ["extern"]:
            return "extern"
        keyword = next(
            (i for i, word in enumerate(head) if word in ("struct", "class", "union")), None
        )
        if keyword is not None and "(" not in head[:keyword]:
            rest = head[keyword:]
            if "(" not in rest or "alignas" in rest or "__attribute__" in rest:
                return "class"
        if "enum" in head:
            return "enum"
        return "function" if "(" in head else "declaration"

    def _after_templates(self, at: int) -> int:
        while self.tokens[at] == "template" and self.tokens[self.tokens.after(at)] == "<":
            at = self.tokens.after(self.tokens.after_template(self.tokens.after(at)) - 1)
        return at

    def _repeats(self, item: _Item, kind: str, words: list[str], seen: set[str]) -> bool:
        """Whether only address spaces tell the item from one before it in its scope."""
        is_template_class = kind == "class" and words[0] == "template"
        head = self.tokens.words(item.begin, item.body[0] if item.body else item.end)
        if not (("(" in head or is_template_class) and ADDRESS_SPACES.intersection(words)):
            return False
        key = " ".join(word for word in words if word not in ADDRESS_SPACES)
        if key in seen:
            return True
        seen.add(key)
        return False

    def _read_constant(self, item: _Item) -> None:
        id_text = self.tokens.attributes(item.begin, item.end)["function_constant"]
        words = self.tokens.words(item.begin, item.end, attributes=False)
        words = [word for word in words if word not in ADDRESS_SPACES | {"const", "static", ";"}]
        constant = FunctionConstant(
            words[-1], " ".join(words[:-1]), int(id_text, 0), (item.begin, item.end)
        )
        self.constants[constant.name] = constant

    def _read_instance(self, item: _Item, words: list[str]) -> None:
        """`template [[host_name("n")]] kernel void f<T>(...)`, or decltype(f<T>) before it."""
        attributes = self.tokens.attributes(item.begin, item.end)
        if "host_name" not in attributes and "kernel" not in words and "kernel" not in attributes:
            return
        words = self.tokens.words(item.begin, item.end, attributes=False)
        if "decltype" in words:
            begin = words.index("decltype") + 2
            end = _end_of(words, begin, ")")
        else:
            begin = words.index("void") + 1
            end = _end_of(words, begin, "(")
        expression = " ".join(words[begin:end])
        self.instances[_unquote(attributes.get("host_name")) or expression] = expression
        self.explicit.append((item.begin, item.end))

    def _read_kernel(self, item: _Item) -> None:
        tokens = self.tokens
        opened = self._parameter_list(item)
        name = tokens[tokens.before(opened)]
        attributes = tokens.attributes(item.begin, opened)
        limit = attributes.get("max_total_threads_per_threadgroup")
        factors = [factor.strip() for factor in limit.split("*")] if limit else [""]
        known = all(factor.isdigit() for factor in factors)
        max_threads = math.prod(map(int, factors)) if known else None
        self.kernels[name] = Kernel(name, self._parameters(name, opened), max_threads)
        if tokens[item.begin] != "template":
            self.plain_kernels.append(item.begin)
        self.instances.setdefault(_unquote(attributes.get("host_name")) or name, name)

    def _parameter_list(self, item: _Item) -> int:
        """The parenthesis that opens the parameters of a function."""
        tokens = self.tokens
        at = self._after_templates(item.begin)
        while True:
            if tokens[at] == "(":
                name = tokens[tokens.before(at)]
                is_call_operator = (
                    name == "operator" and tokens[tokens.after(tokens.closing(at))] == "("
                )
                if name != "__attribute__" and not is_call_operator:
                    return at
            at = tokens.closing(at) + 1 if tokens.opens(at) else at + 1

    def _class_name(self, item: _Item) -> str:
        words = self.tokens.words(self._after_templates(item.begin), item.body[0], attributes=False)
        keyword = next(i for i, word in enumerate(words) if word in ("struct", "class", "union"))
        return next((word for word in words[keyword + 1 :] if _NAME.match(word)), "")

    def _read_method(self, item: _Item, class_name: str) -> None:
        tokens = self.tokens
        opened = self._parameter_list(item)
        closed = tokens.closing(opened)
        before = tokens.words(item.begin, opened)
        after = tokens.words(closed, item.body[0])
        is_constructor = before[-1] == class_name and "operator" not in before
        is_member = not {"static", "friend", "~"}.intersection(before)
        if is_member and not is_constructor and not ADDRESS_SPACES.intersection(after):
            self.methods.append(closed)

    def _parameters(self, kernel: str, opened: int) -> list[Parameter]:
        parameters = []
        next_buffer = 0
        for begin, end in self._split_at_commas(opened):
            parameter = self._parameter(kernel, begin, end, next_buffer)
            if parameter.is_buffer:
                next_buffer = max(next_buffer, parameter.index + 1)
            parameters.append(parameter)
        return parameters

    def _split_at_commas(self, opened: int):
        tokens = self.tokens
        closed = tokens.closing(opened)
        begin = at = opened + 1
        while at <= closed:
            if at == closed or tokens[at] == ",":
                if tokens.words(begin, at):
                    yield begin, at
                begin = at + 1
            elif tokens.opens(at):
                at = tokens.closing(at)
            elif tokens[at] == "<":
                at = tokens.after_template(at) - 1
            at += 1

    def _parameter(self, kernel: str, begin: int, end: int, next_buffer: int) -> Parameter:
        attributes = self.tokens.attributes(begin, end)
        words = self.tokens.words(begin, end, attributes=False)
        name = next(word for word in reversed(words) if _NAME.match(word))
        condition = attributes.get("function_constant")
        space = next((word for word in words if word in ADDRESS_SPACES), None)
        if space == "threadgroup":
            return Parameter(
                name, "kThreadgroupMemory", int(attributes.get("threadgroup") or 0), condition
            )
        if space in ("device", "constant"):
            index = int(attributes["buffer"], 0) if "buffer" in attributes else next_buffer
            is_uniform = space == "constant" and "&" in words and "*" not in words
            is_written = space == "device" and "const" not in words
            return Parameter(
                name, "kUniform" if is_uniform else "kBuffer", index, condition, is_written
            )
        for attribute in attributes:
            if attribute in _BUILT_IN:
                return Parameter(name, _BUILT_IN[attribute])
        raise ValueError(f"kernel {kernel}: parameter {' '.join(words)} has no known attribute")

    def _find_variables(self) -> list[tuple[int, int]]:
        """`threadgroup T x[n];` inside braces, which is neither a pointer nor a function."""
        tokens = self.tokens
        found, open_brackets = [], []
        for at in range(len(tokens)):
            if tokens.opens(at):
                open_brackets.append(tokens[at])
            elif tokens.kind(at) == "operator" and tokens[at] in ")]}" and open_brackets:
                open_brackets.pop()
            elif tokens[at] == "threadgroup" and open_brackets and open_brackets[-1] == "{":
                end = self._variable_end(at)
                if end is not None:
                    found.append((at, end))
        return found

    def _variable_end(self, at: int) -> int | None:
        tokens = self.tokens
        at = tokens.after(at)
        while at < len(tokens) and tokens[at] != ";":
            if tokens[at] in ("*", "&", "(", "}", "="):
                return None
            if tokens[at] == "<" and tokens.kind(tokens.before(at)) == "name":
                at = tokens.after_template(at)
                continue
            if tokens.opens(at):
                at = tokens.closing(at)
            at += 1
        return at if at < len(tokens) else None


def _end_of(words: list[str], begin: int, closing: str) -> int:
    """Where the template id that begins at `begin` is ended by `closing`, outside brackets."""
    depth = 0
    for at in range(begin, len(words)):
        if words[at] == closing and depth == 0:
            return at
        depth += (words[at] in ("<", "(")) - (words[at] in (">", ")"))
    raise ValueError(f"cannot read the instantiation {' '.join(words)}")


def _unquote(text: str | None) -> str | None:
    """Adjacent string literals, as macros produce them, to one text."""
    return "".join(re.findall(r'"((?:\\.|[^"\\])*)"', text)) if text else None
