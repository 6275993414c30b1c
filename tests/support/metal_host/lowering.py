"""From preprocessed Metal source to C++ of the host.

The text is rewritten in six ways, and in no other:

1. Address spaces are erased; `address_spaces.check` judges them.
2. A `threadgroup` variable becomes a static of the section `metal_host_threadgroup`,
   reached through a pointer that the optimiser cannot see through.
3. A function constant becomes a constant with its value, so that what it
   switches off is gone, as in a specialised pipeline. One without a value
   becomes an undefined symbol.
4. Of functions that differ only in address spaces the first stays.
5. Attributes are erased.
6. Explicit instantiations are erased, and a kernel that was not asked for is
   `inline`: only the one that runs is compiled.

`#line` marks survive, so findings name the kernel's own file and line.
"""

import numpy as np

from .compiler import Compiler
from .declarations import Declarations, FunctionConstant, Kernel
from .paths import PREDEFINED
from .tokens import ADDRESS_SPACES, Tokens

_SECTION = '__attribute__((section("metal_host_threadgroup")'
_UNSET = "metal_host_unset_"
# Bytes after each variable, which belong to none: an overrun lands there.
_PADDING = 64


_PREDEFINED = {"__METAL__": 1, "__METAL_VERSION__": 310, "__HAVE_BFLOAT__": 1, "__AIR64__": 1}


def preprocess(
    compiler: Compiler, text: str, include_dirs, defines: dict[str, object], name: str
) -> str:
    """Expand `text` with Metal's predefined macros; `name` is its file name in messages."""
    arguments = [
        "-E",
        "-x",
        "c++",
        "-std=c++17",
        "-nostdinc",
        "-nostdinc++",
        "-undef",
        "-Wno-everything",
    ]
    arguments += [f"-D{macro}={value}" for macro, value in (_PREDEFINED | dict(defines)).items()]
    for directory in [PREDEFINED, *include_dirs]:
        arguments += ["-I", str(directory)]
    return compiler.run([*arguments, "-"], f"preprocessing of {name}", f'# 1 "{name}"\n{text}')[0]


def lower(declared: Declarations, constants: dict[int, object]) -> str:
    """The source as C++, with function constants (by id) at the given values."""
    tokens = declared.tokens.copy()
    for begin, end in declared.explicit + declared.repeats:
        tokens.erase(begin, end)
    for constant in declared.constants.values():
        tokens.erase(*constant.span)
        tokens.replace(constant.span[0], _define(constant, constants.get(constant.id)))
    for begin, end in declared.variables:
        _lower_variable(tokens, begin, end)
    for begin, end in tokens.attribute_spans(0, len(tokens)):
        tokens.erase(begin, end)
    for begin in declared.plain_kernels:
        tokens.replace(
            begin, "inline " + ("" if tokens[begin] in ("kernel", "[") else tokens[begin])
        )
    _lower_words(tokens)
    return tokens.text()


def entry_point(expression: str, kernel: Kernel) -> str:
    """C++ that calls the kernel for one thread, and tells where its threadgroup variables lie."""
    bindings = ", ".join(
        f"metal_host::Parameter{{metal_host::{p.binding}, {p.index}}}" for p in kernel.parameters
    )
    exported = 'extern "C" __attribute__((visibility("default")))'
    return f"""
# 1 "entry point"
{exported} void metal_host_entry(const MetalHostThread* thread) {{
  metal_host::Call<decltype(&{expression})>::run<{bindings}>(&{expression}, thread);
}}
extern "C" char __start_metal_host_threadgroup[] __attribute__((weak));
extern "C" char __stop_metal_host_threadgroup[] __attribute__((weak));
{exported} char* metal_host_variables_begin() {{ return __start_metal_host_threadgroup; }}
{exported} char* metal_host_variables_end() {{ return __stop_metal_host_threadgroup; }}
"""


def unset_symbol(id: int) -> str:
    """The undefined symbol that stands for function constant `id` without a value."""
    return f"{_UNSET}{id}"


def unset_id(message: str) -> int | None:
    """The function constant a linker's message about an undefined symbol is about."""
    _, found, rest = message.partition(_UNSET)
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return int(digits) if found else None


def literal(type_name: str, value: object) -> str:
    """A function constant's value in C++."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return f"({type_name}){float(value)!r}f"
    return f"({type_name}){int(value)}"


def _define(constant: FunctionConstant, value: object | None) -> str:
    known = f"static constexpr bool metal_host_has_{constant.name} = {'false' if value is None else 'true'};"
    if value is None:
        symbol = unset_symbol(constant.id)
        return f'extern const {constant.type} {constant.name} __asm__("{symbol}"); {known}'
    return f"static constexpr {constant.type} {constant.name} = {literal(constant.type, value)}; {known}"


def _lower_variable(tokens: Tokens, begin: int, end: int) -> None:
    """`threadgroup T x[n];` -> a static x_storage, padding, and a reference x to its place."""
    names = _declared_names(tokens, begin, end)
    tokens.replace(begin, f"{_SECTION})) static")
    references = ""
    for at in names:
        name = tokens[at]
        references += f" {_SECTION}, used)) static char {name}_padding[{_PADDING}];"
        references += f" auto& {name} = *metal_host::threadgroup_variable(&{name}_storage);"
        tokens.replace(at, f"{name}_storage")
    tokens.replace(end, ";" + references)


def _declared_names(tokens: Tokens, begin: int, end: int) -> list[int]:
    """Where the names of `T a[n], b;` are: the last name before each bracket, comma or end."""
    names, last, complete = [], None, False
    at = begin + 1
    while at <= end:
        text = tokens[at]
        if text == "<" and not complete and tokens.kind(tokens.before(at)) == "name":
            at = tokens.after_template(at)
            continue
        if text in ("[", ",", ";") and not complete:
            names.append(last)
        if text == "[":
            complete = True
            at = tokens.closing(at)
        elif text == ",":
            complete = False
        elif tokens.kind(at) == "name" and not complete:
            last = at
        at += 1
    return names


def _lower_words(tokens: Tokens) -> None:
    for at in range(len(tokens)):
        if tokens.kind(at) != "name":
            continue
        text = tokens[at]
        if text in ADDRESS_SPACES:
            _lower_address_space(tokens, at)
        elif text == "kernel":
            tokens.erase(at, at + 1)
        elif text == "is_function_constant_defined":
            tokens.erase(at, at + 1)
            name = tokens.after(tokens.after(at))
            tokens.replace(name, f"metal_host_has_{tokens[name]}")


def _lower_address_space(tokens: Tokens, at: int) -> None:
    """Erase the word; a program-scope `constant T x = ...;` is constant in C++ too."""
    is_constant = tokens[at] == "constant"
    before = tokens.before(at)
    starts_statement = before < 0 or tokens[before] in (";", "{", "}")
    if is_constant and starts_statement and not _is_pointer(tokens, at):
        tokens.replace(at, "static const")
        return
    if (
        is_constant
        and before > 0
        and tokens[before] == "const"
        and tokens[tokens.before(before)] == "static"
    ):
        tokens.replace(before, "constexpr")
    tokens.erase(at, at + 1)


def _is_pointer(tokens: Tokens, at: int) -> bool:
    """Whether the declaration that begins at `at` declares a pointer, reference or function."""
    while at < len(tokens) and tokens[at] not in ("=", ";", "["):
        if tokens[at] in ("*", "&", "(", "{"):
            return True
        at += 1
    return False
