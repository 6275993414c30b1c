"""What a stock compiler leaves of a kernel: state in memory, live words, code, threadgroup memory.

A kernel is compiled as for a run, but everything is inlined and what the lanes of a simdgroup
do together is one opaque instruction. What is left is counted in the optimiser's own text.
None of this is Apple's compiler: an array that a stock optimiser cannot take apart is in
memory everywhere, a figure of live words tells designs apart and no more.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from . import lowering
from .compiler import cache_directory, digest, find_compiler
from .declarations import Declarations
from .paths import INCLUDE
from .variant import shim_text

_FLAGS = (
    "-std=c++23 -O2 -fPIC -nostdinc -nostdinc++ -fno-exceptions -fno-rtti -fno-vectorize -fno-slp-vectorize "
    "-fno-strict-aliasing -fno-math-errno -ffp-contract=fast -fno-stack-protector -fno-threadsafe-statics "
    "-Xclang -cl-single-precision-constant -Wno-everything -DMETAL_HOST_OPAQUE -g0 -S -emit-llvm "
    "-mllvm -inline-threshold=1000000 -mllvm -disable-vector-combine"
).split()


@dataclass(frozen=True)
class Footprint:
    """Of one variant.

    Attributes:
        in_memory: Variables of a thread that are not in registers, by type.
        live_words: The most 32-bit words of a lane that are alive at once, in the optimiser's
            order. Values that all lanes of a simdgroup share are not counted.
        loop_instructions: Instructions of the largest loop.
        threadgroup_bytes: Of the kernel's threadgroup variables.
        long_divisions: Divisions and remainders of 64 bits, which a GPU emulates.
    """

    in_memory: tuple[str, ...]
    live_words: int
    loop_instructions: int
    threadgroup_bytes: int
    long_divisions: int


def footprint(text: str, kernel: str, include_dirs, constants: dict[int, object]) -> Footprint:
    """Compile ``kernel`` of a Metal source, or take its footprint from the cache."""
    compiler = find_compiler()
    preprocessed = lowering.preprocess(compiler, text, include_dirs, {}, kernel)
    own = Path(__file__).read_text()
    key = digest(compiler.identity, shim_text(), own, preprocessed, repr(sorted(constants.items())))
    kept = cache_directory() / f"footprint-{key}.json"
    if not kept.exists():
        declared = Declarations(preprocessed)
        expression, entry = declared.resolve(kernel)
        source = '#include "metal_host.h"\n' + lowering.lower(declared, constants)
        source += lowering.entry_point(expression, entry)
        kept.write_text(json.dumps(asdict(_read(_optimised(kernel, source)))))
    fields = json.loads(kept.read_text())
    return Footprint(**fields | {"in_memory": tuple(fields["in_memory"])})


def _optimised(kernel: str, source: str) -> str:
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as directory:
        written, output = Path(directory) / "kernel.cpp", Path(directory) / "kernel.ll"
        written.write_text(source)
        flags = [*_FLAGS, *compiler.flags, "-I", str(INCLUDE), "-o", str(output), str(written)]
        compiler.run(flags, f"compiling {kernel}")
        return output.read_text()


def _read(optimised: str) -> Footprint:
    functions = re.split(r"\ndefine ", optimised)[1:]
    (entry,) = (f for f in functions if "@metal_host_entry(" in f.split("\n", 1)[0])
    body = _Body(entry)
    return Footprint(
        tuple(body.in_memory()),
        round(body.live_words()),
        body.loop_instructions(),
        _threadgroup_bytes(entry),
        len(re.findall(r" = [su](?:div|rem) (?:exact )?i64 ", entry)),
    )


_WORDS = {"half": 0.5, "bfloat": 0.5, "float": 1, "double": 2, "ptr": 2, "void": 0}
_NAME = re.compile(r"%[\w.$-]+")
# Loads and stores of a GPU take a place and a distance from it: a pointer at a constant
# distance from another, and an index made 64 bits wide, take no register of their own. Nor
# do the same bits under another type.
_NEAR = re.compile(
    r"getelementptr [^%]*(?:%\"[^\"]*\", )?ptr %[\w.$-]+(?:, i\d+ -?\d+)+$"
    r"|[sz]ext (?:nneg )?i32 %[\w.$-]+ to i64$"
    r"|bitcast "
)
_CONVERSION = re.compile(
    r"(zext|sext|trunc|fpext|fptrunc|bitcast|sitofp|uitofp|fptosi|fptoui|ptrtoint|inttoptr|addrspacecast)\b"
)
_FLAG = r"(?:(?:nuw|nsw|exact|disjoint|fast|contract|nneg|samesign|nnan|ninf|nsz|arcp|afn|reassoc|inbounds|volatile|tail|noundef|range\([^)]*\)) )*"
_TYPE = r"(<\d+ x \w+>|\w+)"
_HALF = re.compile(r"trunc (?:nuw |nsw )*i32 \S+ to i16$")
_UPPER_HALF = re.compile(r"lshr (?:exact )?i32 \S+, 16$")
_FREE = (
    "phi",
    "bitcast",
    "extractelement",
    "insertelement",
    "shufflevector",
    "br",
    "freeze",
    "extractvalue",
)


@dataclass
class _Instruction:
    result: str | None
    text: str
    operands: list[str]
    incoming: list[tuple[str, str]]  # of a phi: value, block
    bases: list[str] = field(default_factory=list)  # operands, as what takes a register


class _Body:
    """A function of LLVM's text form."""

    def __init__(self, text: str):
        self.blocks: dict[str, list[_Instruction]] = {}
        self.next: dict[str, list[str]] = {}
        self.base: dict[str, str] = {}  # of what takes no register of its own
        self._read(text.split("\n")[1:])
        for instruction in self._all():
            bases = [self.base.get(name, name) for name in instruction.operands]
            instruction.bases = bases
            phi = [(self.base.get(value, value), block) for value, block in instruction.incoming]
            instruction.incoming = phi
        self.words = {i.result: _words_of(i.text) for i in self._all() if i.result}
        for name in self._threadgroup_places():
            self.words[name] = 1

    def _read(self, lines: list[str]) -> None:
        block = "%entry"
        self.blocks[block] = []
        for line in _joined(lines):
            label = re.match(r"([\w.$-]+):", line)
            if label:
                block = "%" + label[1]
                self.blocks[block] = []
                continue
            text = re.sub(r", !.*", "", line.strip())
            if not text or text[0] in ";#" or "llvm.lifetime" in text or "llvm.assume" in text:
                continue
            self.blocks[block].append(self._instruction(text))
        names = list(self.blocks)
        for name, instructions in self.blocks.items():
            last = instructions[-1].text if instructions else ""
            self.next[name] = [t for t in re.findall(r"label (%[\w.$-]+)", last) if t in names]

    def _instruction(self, text: str) -> _Instruction:
        named = re.match(r"(%[\w.$-]+) = (.*)", text)
        result, text = (named[1], named[2]) if named else (None, text)
        if text.startswith("phi"):
            return _Instruction(result, text, [], re.findall(r"\[ ([^,]+), (%[\w.$-]+) \]", text))
        operands = _NAME.findall(re.sub(r"label %[\w.$-]+|%\"[^\"]*\"", "", text))
        if _NEAR.match(text) and operands:
            self.base[result] = self.base.get(operands[0], operands[0])
        return _Instruction(result, text, operands, [])

    def _threadgroup_places(self) -> list[str]:
        """Pointers into threadgroup memory, which has no more than 32 bits of addresses."""
        places = []
        for instruction in self._all():
            is_place = instruction.text.startswith("getelementptr")
            known = is_place and any(name in places for name in instruction.operands)
            if known or "@metal_host_threadgroup_variable(" in instruction.text:
                places.append(instruction.result)
        return places

    def in_memory(self) -> list[str]:
        """Types of what the function keeps on its stack, arguments of the host's runtime left out."""
        kept = [
            i for i in self._all() if i.text.startswith("alloca") and self._is_accessed(i.result)
        ]
        types = [re.match(r"alloca (.*?)(?:, align \d+)?$", i.text)[1] for i in kept]
        return [t for t in types if "Uniform" not in t]

    def _is_accessed(self, variable: str) -> bool:
        """Whether anything is loaded from, or stored to, places in a variable."""
        places = {variable}
        for instruction in self._all():
            if places.intersection(instruction.operands):
                if instruction.text.startswith("getelementptr"):
                    places.add(instruction.result)
                else:
                    return True
        return False

    def divergent(self) -> set[str]:
        """Values that differ between the lanes of a simdgroup."""
        found: set[str] = set()
        size = -1
        while size != len(found):
            size = len(found)
            for instruction in self._all():
                uses = instruction.operands + [value for value, _ in instruction.incoming]
                born = '"# ' in instruction.text
                if instruction.result and (born or any(use in found for use in uses)):
                    found.add(instruction.result)
        return found

    def _all(self):
        for block in self.blocks.values():
            yield from block

    def live_words(self) -> float:
        """The most words of divergent values that are alive at one place."""
        live_in: dict[str, set[str]] = {name: set() for name in self.blocks}
        live_out: dict[str, set[str]] = {name: set() for name in self.blocks}
        divergent, changed = self.divergent(), True
        while changed:
            changed = False
            for name in reversed(self.blocks):
                out = set()
                for follower in self.next[name]:
                    out |= live_in[follower]
                    for phi in self.blocks[follower]:
                        out |= {v for v, from_ in phi.incoming if from_ == name and v in divergent}
                alive = set(out)
                for instruction in reversed(self.blocks[name]):
                    alive.discard(instruction.result)
                    alive.update(u for u in instruction.bases if u in divergent)
                if out != live_out[name] or alive != live_in[name]:
                    live_out[name], live_in[name], changed = out, alive, True
        most = 0.0
        for name, block in self.blocks.items():
            alive = set(live_out[name])
            most = max(most, sum(self.words[v] for v in alive))
            for instruction in reversed(block):
                alive.discard(instruction.result)
                alive.update(u for u in instruction.bases if u in divergent)
                most = max(most, sum(self.words[v] for v in alive))
        return most

    def loop_instructions(self) -> int:
        """Instructions of the largest loop: of the blocks that reach each other."""
        reached = {name: self._reachable(name) for name in self.blocks}
        loops = {
            frozenset(b for b in reached[a] if a in reached[b]) for a in reached if a in reached[a]
        }
        return max((sum(self._cost(b) for b in loop) for loop in loops), default=0)

    def _cost(self, block: str) -> int:
        return sum(not self._is_free(i) for i in self.blocks[block])

    def _is_free(self, instruction: _Instruction) -> bool:
        """Parts of vectors, and halves of words, are where they are: they cost no instruction."""
        text = instruction.text
        if text.startswith(_FREE) or _HALF.match(text):
            return True
        return bool(_UPPER_HALF.match(text)) and instruction.result in self._halved

    @cached_property
    def _halved(self) -> set[str]:
        """Values that nothing takes but their lower half."""
        uses = [(name, bool(_HALF.match(i.text))) for i in self._all() for name in i.operands]
        phis = {value for i in self._all() for value, _ in i.incoming}
        taken_whole = {name for name, is_half in uses if not is_half}
        return {name for name, is_half in uses if is_half} - taken_whole - phis

    def _reachable(self, start: str) -> set[str]:
        found, todo = set(), list(self.next[start])
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += self.next[name]
        return found


def _joined(lines: list[str]):
    """Lines, each `switch` as one."""
    held = ""
    for line in lines:
        if line.startswith("}"):
            return
        held += line
        if re.match(r"\s*switch .*\[$", held.split("\n")[0]) and not line.strip().endswith("]"):
            held += " "
            continue
        yield held
        held = ""


def _words_of(text: str) -> float:
    """Words of an instruction's result."""
    operation = text.split()[0]
    if operation in ("icmp", "fcmp"):
        return 1 / 32
    if operation in ("getelementptr", "alloca"):
        return _WORDS["ptr"]
    if _CONVERSION.match(text):
        return _size(text.rsplit(" to ", 1)[1])
    if operation == "extractelement":
        return _size(re.match(r"extractelement <\d+ x (\w+)>", text)[1])
    if operation == "shufflevector":
        parts = re.findall(r"<(\d+) x (\w+)>", text)
        return int(parts[-1][0]) * _size(parts[0][1])
    if operation == "extractvalue":
        return 1
    if operation in ("call", "tail", "notail"):
        if re.search(r"call [^(]*{", text):
            return 0  # several values, extracted one by one
        return _size(re.search(rf"call {_FLAG}(?:[a-z]+ )*?{_TYPE} (?:asm|@|%|\()", text)[1])
    if operation == "select":
        return _size(re.match(rf"select {_FLAG}(?:<\d+ x i1>|i1) [^,]+, {_TYPE}", text)[1])
    if operation == "phi" and "{" in text.split("[")[0]:
        return text.split("}")[0].count(",") + 1
    found = re.match(rf"\w+ {_FLAG}{_TYPE}", text)
    if not found:
        raise ValueError(f"[footprint] the optimiser's text must be understood; got {text!r}.")
    return _size(found[1])


def _size(type_name: str) -> float:
    vector = re.match(r"<(\d+) x (\w+)>", type_name)
    if vector:
        return int(vector[1]) * _size(vector[2])
    name = type_name.split()[0].rstrip(",")
    if re.fullmatch(r"i\d+", name):
        return int(name[1:]) / 32
    return _WORDS.get(name, 1)


def _threadgroup_bytes(entry: str) -> int:
    sizes = re.findall(r"@metal_host_threadgroup_variable\(.*, i64 noundef (\d+)\)", entry)
    return sum(map(int, sizes))
