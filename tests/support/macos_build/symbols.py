"""Symbols of a 64-bit Mach-O file: what it defines for others and what it wants from them."""

import struct
from dataclasses import dataclass
from pathlib import Path

_MAGIC, _SYMTAB = 0xFEEDFACF, 2
_DEBUG, _TYPE, _EXTERNAL, _UNDEFINED = 0xE0, 0x0E, 0x01, 0x00
_HEADER, _ENTRY = struct.Struct("<8I"), struct.Struct("<IBBHQ")


@dataclass(frozen=True)
class Symbols:
    """Names as the linker has them, with the leading underscore."""

    defined: frozenset[str]
    undefined: frozenset[str]


def read(path: Path) -> Symbols:
    """The external symbols of an object file or a library.

    Raises:
        ValueError: It is not a 64-bit Mach-O file with a symbol table.
    """
    data = Path(path).read_bytes()
    magic, *_, num_commands, _, _, _ = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(f"[symbols] {path} must be a 64-bit Mach-O file; got magic {magic:#x}.")
    at = _HEADER.size
    for _ in range(num_commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _SYMTAB:
            return _table(data, *struct.unpack_from("<4I", data, at + 8))
        at += size
    raise ValueError(f"[symbols] {path} must have a symbol table; got none.")


def _table(data: bytes, offset: int, count: int, strings: int, size: int) -> Symbols:
    names = data[strings : strings + size]
    defined, undefined = set(), set()
    for name_at, kind, _, _, _ in _ENTRY.iter_unpack(data[offset : offset + count * _ENTRY.size]):
        if kind & _DEBUG or not kind & _EXTERNAL:
            continue
        name = names[name_at : names.index(b"\0", name_at)].decode()
        (undefined if kind & _TYPE == _UNDEFINED else defined).add(name)
    return Symbols(frozenset(defined), frozenset(undefined))
