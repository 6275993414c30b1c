"""Checks address spaces, which the host has not: a pointer without one is an error on a Mac.

The kernels are type-checked as C++ for OpenCL, whose global, constant, local and
private are distinct in the type system as Metal's device, constant, threadgroup
and thread are. Nothing is generated or run. One rule is added, since that
language allows what Metal does not: a pointer, reference or cast that names no
address space.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path

from . import lowering
from .compiler import MetalHostError, find_compiler
from .declarations import Declarations, FunctionConstant
from .paths import INCLUDE
from .program import read_source
from .tokens import ADDRESS_SPACES, Tokens

_COMPILERS = ("clang++-19", "clang++-20", "clang++-21", "clang++")
_SPACES = {
    "device": "__global",
    "constant": "__constant",
    "threadgroup": "__local",
    "thread": "__private",
}
_FLAGS = (
    "-x clcpp -cl-std=clc++2021 --target=x86_64-linux-gnu -cl-no-stdinc -Xclang -cl-ext=+all "
    "-DMETAL_HOST_ADDRESS_SPACES -fsyntax-only -w -ferror-limit=60 -Wno-c++11-narrowing"
).split()
# `c ? variable : float4(...)`: vectors are classes here, which a conditional operator does not load.
_VECTOR = r"'(?:const )?(?:__\w+ )?vec<[^']*'"
_FALSE_ERROR = re.compile(rf"incompatible operand types \({_VECTOR} and {_VECTOR}\)")
_NAME = re.compile(r"[A-Za-z_]\w*$")
_VALUE_TYPE = re.compile(
    r"(void|bool|char|uchar|short|ushort|int|uint|long|ulong|size_t|half|float|bfloat|u?int(8|16|32|64)_t)[234]?$|[TU]$"
)
_NO_DECLARATION = {"return", "typename", "using", "typedef", "auto", "sizeof"}


@functools.cache
def find_checker() -> str | None:
    """A clang with C++ for OpenCL, or None. The ziglang wheel has it not; Debian's clang-19 has."""
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        done = subprocess.run([path, *_FLAGS, "-"], input="", capture_output=True, text=True)
        if done.returncode == 0:
            return path
    return None


def check(source, include_dirs=(), kernels=(), constants=None, defines=()) -> list[str]:
    """The address-space errors of a source, as `file:line: message`.

    Args:
        source: Text, a path, or a list of paths, as for Program.
        kernels: Host names or template ids whose instances are checked too; of
            other templates only the definition is.
        constants: Function constants by id; default 0.
        include_dirs, defines: As for Program.

    Raises:
        MetalHostError: No compiler here can do it, or the source does not preprocess.
    """
    checker = find_checker()
    if checker is None:
        raise MetalHostError(
            "the address-space check needs a clang with C++ for OpenCL: apt-get install clang-19"
        )
    text, name = read_source(source)
    declared = Declarations(lowering.preprocess(find_compiler(), text, include_dirs, defines, name))
    checked = '#include "metal_host.h"\n' + _to_opencl(declared, constants or {})
    for kernel in kernels:
        expression, _ = declared.resolve(kernel)
        if "<" in expression:
            checked += f'\n# 1 "instance {kernel}"\ntemplate decltype({expression}) {expression};\n'
    done = subprocess.run(
        [checker, *_FLAGS, "-I", str(INCLUDE), "-"], input=checked, capture_output=True, text=True
    )
    errors = [
        line for line in done.stderr.splitlines() if ": error:" in line or ": fatal error:" in line
    ]
    return [_short(error) for error in errors if not _FALSE_ERROR.search(error)] + unnamed_spaces(
        declared.tokens
    )


def _short(error: str) -> str:
    """`/a/b.metal:3:7: error: text` as `b.metal:3: text`."""
    match = re.match(r"(.*?):(\d+):(?:\d+:)? (?:fatal )?error: (.*)", error)
    return f"{Path(match[1]).name}:{match[2]}: {match[3]}" if match else error


def _to_opencl(declared: Declarations, constants: dict) -> str:
    tokens = declared.tokens.copy()
    for begin, end in declared.explicit:
        tokens.erase(begin, end)
    for constant in declared.constants.values():
        tokens.erase(*constant.span)
        tokens.replace(constant.span[0], _define(constant, constants.get(constant.id, 0)))
    for closed in declared.methods:
        tokens.replace(closed, ") __private")
    for begin, end in declared.variables:
        _to_reference(tokens, begin, end)
    for begin, end in tokens.attribute_spans(0, len(tokens)):
        tokens.erase(begin, end)
    classes = {
        tokens[tokens.after(at)]
        for at in range(len(tokens) - 1)
        if tokens[at] in ("struct", "class")
    }
    for at in range(len(tokens)):
        if tokens.kind(at) == "name":
            _translate(tokens, at, classes)
    return tokens.text()


def _define(constant: FunctionConstant, value) -> str:
    return f"__constant {constant.type} {constant.name} = {lowering.literal(constant.type, value)};"


def _to_reference(tokens: Tokens, begin: int, end: int) -> None:
    """`threadgroup T x[n];` -> a reference to local memory: the language has none inside a block."""
    declaration = " ".join(tokens.text(begin + 1, end).split())
    type_name, name, extent = re.match(
        r"(.*?)\b(\w+)\s*((?:\[[^;]*?\]\s*)*)$", declaration
    ).groups()
    tokens.erase(begin, end)
    if extent:
        tokens.replace(
            begin, f"__local {type_name} (&{name}){extent} = *(__local {type_name} (*){extent})0"
        )
    else:
        tokens.replace(begin, f"__local {type_name} &{name} = *(__local {type_name} *)0")


def _translate(tokens: Tokens, at: int, classes: set[str]) -> None:
    text = tokens[at]
    if text == "kernel":
        tokens.erase(at, at + 1)
    elif text == "is_function_constant_defined":
        tokens.replace(at, "(bool)")
    elif text in _SPACES:
        before = tokens.before(at)
        if (
            text == "constant"
            and tokens[before] == "const"
            and tokens[tokens.before(before)] == "static"
        ):
            tokens.replace(before, "constexpr")
        if text == "thread" and tokens[before] == ")" and _function_name(tokens, before) in classes:
            tokens.erase(at, at + 1)  # the object under construction is in no named space here
        else:
            tokens.replace(at, _SPACES[text])


def _function_name(tokens: Tokens, closed: int) -> str:
    """The name before the parentheses that close at `closed`."""
    depth, at = 0, closed
    while at > 0:
        depth += (tokens[at] == ")") - (tokens[at] == "(")
        if depth == 0:
            return tokens[tokens.before(at)]
        at -= 1
    return ""


def unnamed_spaces(tokens: Tokens) -> list[str]:
    """Pointers, references and casts of built-in types that name no address space."""
    found = []
    for at, place in enumerate(_places(tokens)):
        text = tokens[at]
        if text in ("reinterpret_cast", "static_cast", "const_cast"):
            begin = tokens.after(at)
            written = tokens.words(begin, tokens.after_template(begin))
            if {"*", "&"}.intersection(written) and not ADDRESS_SPACES.intersection(written):
                found.append(f"{place}: `{text}{''.join(written)}` names no address space")
        elif text == "(" and (written := _c_cast(tokens, at)):
            found.append(f"{place}: `{written}` names no address space")
        elif text in ("*", "&") and (written := _declarator(tokens, at)):
            found.append(f"{place}: `{written}` names no address space")
    return found


def _places(tokens: Tokens):
    """`file:line` of every token."""
    file, line = "?", 1
    for at in range(len(tokens)):
        if tokens.kind(at) == "line":
            mark = re.match(r'#(?:line)? (\d+)(?: "([^"]*)")?', tokens[at])
            if mark:
                file, line = mark[2] or file, int(mark[1])
            else:
                line += 1
            yield f"{Path(file).name}:{line}"
        else:
            yield f"{Path(file).name}:{line}"
            line += tokens[at].count("\n")


def _c_cast(tokens: Tokens, at: int) -> str | None:
    """`(const float*)` before an operand, without an address space."""
    closed = tokens.closing(at)
    words = tokens.words(at + 1, closed)
    if len(words) < 2 or words[-1] != "*" or not all(_NAME.match(word) for word in words[:-1]):
        return None
    following = tokens.after(closed)
    is_cast = tokens.kind(following) in ("name", "number") or tokens[following] in ("(", "&")
    if not is_cast or ADDRESS_SPACES.intersection(words):
        return None
    return f"({' '.join(words)})"


def _declarator(tokens: Tokens, at: int) -> str | None:
    """`float* p` or `float& r`, without an address space."""
    before, name = tokens.before(at), tokens.after(at)
    if before < 0 or tokens.kind(before) != "name" or tokens.kind(name) != "name":
        return None
    if tokens[tokens.after(name)] not in (",", ")", ";", "=", "["):
        return None
    words = _declaration_words(tokens, before)
    if (
        not words
        or not _VALUE_TYPE.match(words[0])
        or (ADDRESS_SPACES | _NO_DECLARATION).intersection(words)
    ):
        return None
    return f"{' '.join(reversed(words))}{tokens[at]} {tokens[name]}"


def _declaration_words(tokens: Tokens, at: int) -> list[str]:
    """Names from `at` back to where its declaration begins; brackets are skipped."""
    depth, words = 0, []
    while at >= 0:
        text = tokens[at]
        if text in (")", "]", ">"):
            depth += 1
        elif text in (";", "{", "}") or (text in ("(", "[", "<", ",") and depth == 0):
            return words if text not in ("[", "<") else []
        elif text in ("(", "[", "<"):
            depth -= 1
        elif depth == 0 and tokens.kind(at) == "name":
            words.append(text)
        at -= 1
    return []
