"""Source lines of a compiled kernel's addresses, from its DWARF 4 line table.

Read here so that no debugger or binutils are needed. Functions of the shim
headers carry no lines of their own, so an address inside one belongs to the
line of the kernel that called it.
"""

import struct
from bisect import bisect_right
from pathlib import Path

_COPY, _ADVANCE_PC, _ADVANCE_LINE, _SET_FILE = 1, 2, 3, 4
_CONST_ADD_PC, _FIXED_ADVANCE_PC = 8, 9
_END_SEQUENCE, _SET_ADDRESS = 1, 2


class LineTable:
    """Maps an offset in a shared library to `file:line`."""

    def __init__(self, library: Path):
        section = _elf_section(library.read_bytes(), ".debug_line")
        rows = [row for unit in _units(section) for row in _run(unit)]
        rows.sort(key=lambda row: (row[0], row[1] != ""))
        self._offsets = [offset for offset, _ in rows]
        self._places = [place for _, place in rows]

    def find(self, offset: int) -> str:
        """The line of the instruction at `offset`, "?" when there is none."""
        at = bisect_right(self._offsets, offset) - 1
        while at >= 0 and not self._places[at]:
            at -= 1
        return self._places[at] if at >= 0 else "?"


class _Reader:
    def __init__(self, data: bytes, at: int = 0):
        self.data = data
        self.at = at

    def take(self, format: str):
        value = struct.unpack_from("<" + format, self.data, self.at)[0]
        self.at += struct.calcsize("<" + format)
        return value

    def text(self) -> str:
        end = self.data.index(b"\0", self.at)
        value = self.data[self.at : end].decode()
        self.at = end + 1
        return value

    def unsigned(self) -> int:
        """LEB128."""
        value = shift = 0
        while True:
            byte = self.take("B")
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def signed(self) -> int:
        start = self.at
        value = self.unsigned()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) else value


def _elf_section(elf: bytes, name: str) -> bytes:
    """The contents of a section of a 64-bit little-endian ELF file; empty when missing."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_index = struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    for name_offset, _, _, _, offset, length in headers:
        if _Reader(elf, names + name_offset).text() == name:
            return elf[offset : offset + length]
    return b""


class _Unit:
    """The header of one compile unit's line program, and where its code lies."""

    def __init__(self, section: bytes, begin: int):
        reader = _Reader(section, begin)
        self.end = reader.take("I") + reader.at
        self.version = reader.take("H")
        if self.version != 4:
            raise ValueError(f"the line table must be DWARF 4; got {self.version}")
        program = reader.take("I")
        self.begin = reader.at + program
        self.min_length = reader.take("B")
        reader.take("B")  # operations per instruction
        reader.take("B")  # default is_stmt
        self.line_base = reader.take("b")
        self.line_range = reader.take("B")
        opcode_base = reader.take("B")
        self.operands = [0] + [reader.take("B") for _ in range(opcode_base - 1)]
        while reader.text():
            pass
        self.files = [""]
        while name := reader.text():
            self.files.append(name.rsplit("/", 1)[-1])
            for _ in range(3):
                reader.unsigned()
        self.reader = _Reader(section, self.begin)


def _units(section: bytes):
    at = 0
    while at < len(section):
        unit = _Unit(section, at)
        yield unit
        at = unit.end


def _run(unit: _Unit):
    """Run a line program: (offset, "file:line") rows, (offset, "") where there is none."""
    reader = unit.reader
    address, file, line = 0, 1, 1
    special = len(unit.operands)
    while reader.at < unit.end:
        opcode = reader.take("B")
        if opcode >= special:
            step, advance = divmod(opcode - special, unit.line_range)
            address += step * unit.min_length
            line += unit.line_base + advance
            yield address, _place(unit, file, line)
        elif opcode == 0:
            size = reader.unsigned()
            after = reader.at + size
            extended = reader.take("B")
            if extended == _END_SEQUENCE:
                yield address, ""
                address, file, line = 0, 1, 1
            elif extended == _SET_ADDRESS:
                address = reader.take("Q")
            reader.at = after
        elif opcode == _COPY:
            yield address, _place(unit, file, line)
        elif opcode == _ADVANCE_PC:
            address += reader.unsigned() * unit.min_length
        elif opcode == _ADVANCE_LINE:
            line += reader.signed()
        elif opcode == _SET_FILE:
            file = reader.unsigned()
        elif opcode == _CONST_ADD_PC:
            address += (255 - special) // unit.line_range * unit.min_length
        elif opcode == _FIXED_ADVANCE_PC:
            address += reader.take("H")
        else:
            for _ in range(unit.operands[opcode]):
                reader.unsigned()


def _place(unit: _Unit, file: int, line: int) -> str:
    return f"{unit.files[file]}:{line}" if line else ""
