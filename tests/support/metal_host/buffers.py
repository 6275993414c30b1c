"""The buffers of a launch: as the caller gives them, and as the kernel gets them."""

import ctypes
from dataclasses import dataclass

import numpy as np

from .native import NUM_BUFFERS, runtime

_ALIGNMENT = 16  # of what a kernel may load at once


@dataclass(frozen=True)
class HostMemory:
    """A buffer that is existing memory, read and written in place.

    Buffers that overlap share their memory in the kernel too.
    """

    address: int
    nbytes: int


def to_buffers(given) -> dict[int, "np.ndarray | HostMemory"]:
    """`{index: value}` or a list of values, as contiguous arrays and HostMemory.

    Raises:
        ValueError: An index is not one that Metal has.
    """
    items = given.items() if isinstance(given, dict) else enumerate(given)
    buffers = {index: _to_buffer(value) for index, value in items if value is not None}
    for index in buffers:
        if not 0 <= index < NUM_BUFFERS:
            raise ValueError(
                f"[run] buffer indices must be in [0, {NUM_BUFFERS}), Metal's limit; got {index}."
            )
    return buffers


def _to_buffer(value):
    if isinstance(value, HostMemory):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = np.frombuffer(value, np.uint8)
    array = np.ascontiguousarray(value)
    return array.reshape(1) if array.ndim == 0 else array


def address_of(buffer) -> int:
    return buffer.address if isinstance(buffer, HostMemory) else buffer.ctypes.data


def overlapping(buffers) -> list[list[int]]:
    """Indices of the buffers, in groups: arrays alone, HostMemory with what it overlaps."""
    groups = [[index] for index, buffer in buffers.items() if not isinstance(buffer, HostMemory)]
    end = None
    hosts = [index for index, buffer in buffers.items() if isinstance(buffer, HostMemory)]
    for index in sorted(hosts, key=lambda index: (buffers[index].address, index)):
        begin = buffers[index].address
        if end is not None and begin < end:
            groups[-1].append(index)
        else:
            groups.append([index])
            end = begin
        end = max(end, begin + buffers[index].nbytes)
    return groups


class DirectMemory:
    """Buffers given to the kernel as they are; arrays are copied first.

    Metal aligns buffers, hosts may not: HostMemory whose address is no multiple of 16 is
    copied to memory where it is, and back after the launch.
    """

    def __init__(self, bound: dict):
        self.outputs = {
            index: value.copy() if isinstance(value, np.ndarray) else value
            for index, value in bound.items()
        }
        self.sizes = {index: value.nbytes for index, value in bound.items()}
        self.slot_of = {index: index for index in bound}
        self._moved: list[tuple[np.ndarray, int, int]] = []  # aligned copy, host address, size
        runtime().unbind()
        for members in overlapping(self.outputs):
            begin = min(address_of(self.outputs[index]) for index in members)
            end = max(address_of(self.outputs[index]) + self.sizes[index] for index in members)
            moved = self._aligned(begin, end - begin) - begin
            for index in members:
                runtime().bind(index, address_of(self.outputs[index]) + moved, self.sizes[index])

    def _aligned(self, address: int, nbytes: int) -> int:
        """`address`, or that of a copy which is aligned."""
        if address % _ALIGNMENT == 0:
            return address
        room = np.empty(nbytes + _ALIGNMENT, np.uint8)
        room = room[-room.ctypes.data % _ALIGNMENT :][:nbytes]
        ctypes.memmove(room.ctypes.data, address, nbytes)
        self._moved.append((room, address, nbytes))
        return room.ctypes.data

    def forbid(self, ranges) -> None:
        if ranges:
            raise ValueError(
                "[run] forbid must be empty, since accesses are not watched without instrument; got ranges."
            )

    def read_back(self) -> dict[int, np.ndarray]:
        for copy, address, nbytes in self._moved:
            ctypes.memmove(address, copy.ctypes.data, nbytes)
        return {
            index: value for index, value in self.outputs.items() if isinstance(value, np.ndarray)
        }


class GuardedMemory:
    """Buffers copied to guarded slots. HostMemory that overlaps shares the slot of its lowest index."""

    def __init__(self, bound: dict):
        self._bound = bound
        self.sizes = {index: value.nbytes for index, value in bound.items()}
        self.slot_of: dict[int, int] = {}
        self._offset: dict[int, int] = {}  # of the buffer in its slot
        self._slots: dict[
            int, tuple[int, int, int]
        ] = {}  # address in the arena, host address, size
        runtime().unbind()
        for members in overlapping(bound):
            self._place(members)

    def _place(self, members: list[int]) -> None:
        slot = min(members)
        begin = min(address_of(self._bound[index]) for index in members)
        end = max(address_of(self._bound[index]) + self.sizes[index] for index in members)
        address = runtime().place(slot, end - begin)
        ctypes.memmove(address, begin, end - begin)
        self._slots[slot] = (address, begin, end - begin)
        for index in members:
            self.slot_of[index] = slot
            self._offset[index] = address_of(self._bound[index]) - begin
            runtime().bind(index, address + self._offset[index], self.sizes[index])

    def forbid(self, ranges) -> None:
        for index, begin, end, *what in ranges:
            if not 0 <= begin <= end <= self.sizes[index]:
                raise ValueError(
                    f"[run] forbid must lie in buffer {index}, which has {self.sizes[index]} B; got [{begin}, {end})."
                )
            offset = self._offset[index]
            kind = what[0] if what else "load"
            runtime().forbid(
                self.slot_of[index],
                begin + offset,
                end + offset,
                kind in ("load", "both"),
                kind in ("store", "both"),
            )

    def read_back(self) -> dict[int, np.ndarray]:
        """Write stored bytes back to HostMemory; return the arrays as the kernel left them."""
        outputs = {}
        for slot, (address, host, _) in self._slots.items():
            begin, end = runtime().stored_range(slot)
            value = self._bound[slot]
            if isinstance(value, np.ndarray):
                outputs[slot] = value.copy() if end else value
                host = outputs[slot].ctypes.data
            if end:
                ctypes.memmove(host + begin, address + begin, end - begin)
        return outputs
