"""The C++ runtime in runtime/: built once, loaded once, one launch at a time."""

import ctypes
import functools
import threading
from dataclasses import dataclass

from .compiler import Compiler, MetalHostError, build, digest, find_compiler
from .paths import INCLUDE, RUNTIME

NUM_BUFFERS = 31  # Metal's limit on [[buffer(n)]]
NUM_THREADGROUP_BUFFERS = 8
MAX_THREADS = 1024

_FLAGS = (
    "-std=c++20 -O2 -fPIC -shared -nostdlib++ -fno-exceptions -fno-rtti -fno-threadsafe-statics -fvisibility=hidden"
).split()
_U64 = ctypes.c_uint64


@dataclass(frozen=True)
class FindingKind:
    """A kind of finding, and what the fields of its rows are about; see runtime/tables.h."""

    fatal: bool
    text: str
    about: str

    @staticmethod
    def parse(description: str) -> "FindingKind":
        fatal, text, about = description.split("|")
        return FindingKind(fatal == "true", text, about)


class Runtime:
    """The loaded runtime. Its state is global: hold `lock` from the first bind to the last read."""

    def __init__(self, compiler: Compiler):
        self.lock = threading.RLock()
        library = ctypes.CDLL(str(_build(compiler)), mode=ctypes.RTLD_GLOBAL)
        self._library = library
        library.metal_host_place.restype = ctypes.c_void_p
        library.metal_host_place.argtypes = [ctypes.c_int, _U64]
        library.metal_host_bind.argtypes = [ctypes.c_int, ctypes.c_void_p, _U64]
        library.metal_host_forbid.argtypes = [ctypes.c_int, _U64, _U64, ctypes.c_int, ctypes.c_int]
        library.metal_host_table_fields.restype = ctypes.c_char_p
        library.metal_host_table_rows.restype = ctypes.POINTER(_U64)
        library.metal_host_finding_kind.restype = ctypes.c_char_p
        self._fields = {}
        self.kinds = [
            FindingKind.parse(library.metal_host_finding_kind(kind).decode())
            for kind in range(library.metal_host_num_finding_kinds())
        ]
        if not library.metal_host_start():
            raise MetalHostError("cannot reserve the addresses of the device arena")

    def unbind(self) -> None:
        self._library.metal_host_unbind()

    def place(self, slot: int, nbytes: int) -> int:
        """Address of a device slot of `nbytes`, whose contents are then up to the caller."""
        return self._library.metal_host_place(slot, nbytes)

    def bind(self, index: int, address: int, nbytes: int) -> None:
        self._library.metal_host_bind(index, address, nbytes)

    def forbid(self, slot: int, begin: int, end: int, loads: bool, stores: bool) -> None:
        self._library.metal_host_forbid(slot, begin, end, loads, stores)

    def stored_range(self, slot: int) -> tuple[int, int]:
        """Bytes [begin, end) of a slot outside which nothing was stored; (0, 0) when nothing was."""
        begin, end = _U64(), _U64()
        self._library.metal_host_stored_range(slot, ctypes.byref(begin), ctypes.byref(end))
        return (begin.value, end.value) if end.value else (0, 0)

    def launch(self, **arguments: int) -> bool:
        """Run what is bound; False when a finding cut the launch short."""
        fields = self._names("arguments")
        unknown = set(arguments) - set(fields)
        assert not unknown, f"no launch argument is called {unknown}"
        row = (_U64 * len(fields))(*(arguments.get(field, 0) for field in fields))
        return bool(self._library.metal_host_launch(row))

    def table(self, name: str) -> list[dict[str, int]]:
        """The rows of a table of the last launch; see runtime/tables.h."""
        fields = self._names(name)
        rows = self._library.metal_host_table_rows(name.encode())
        count = self._library.metal_host_table_count(name.encode())
        width = len(fields)
        return [dict(zip(fields, rows[width * i : width * (i + 1)])) for i in range(count)]

    def _names(self, table: str) -> list[str]:
        if table not in self._fields:
            self._fields[table] = (
                self._library.metal_host_table_fields(table.encode()).decode().split()
            )
        return self._fields[table]


_starting = threading.Lock()


def runtime() -> Runtime:
    """The runtime of this process."""
    with _starting:
        return _start()


@functools.cache
def _start() -> Runtime:
    return Runtime(find_compiler())


def _build(compiler: Compiler):
    sources = sorted(RUNTIME.glob("*.cpp"))
    read = [*sources, *sorted(RUNTIME.glob("*.h")), INCLUDE / "metal_host" / "thread.h"]
    flags = [*_FLAGS, *compiler.flags]

    def make(output) -> str:
        arguments = [*flags, "-o", str(output), *map(str, sources), "-lm"]
        return compiler.run(arguments, "building the Metal host's runtime")[1]

    return build(
        "runtime-" + digest(compiler.identity, *flags, *(path.read_text() for path in read)), make
    )
