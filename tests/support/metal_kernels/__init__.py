"""Drives the Metal kernels through the launch code, on numpy arrays and without a GPU."""

from .attention import Attended, attend, dead_slots, metal_plan
from .launcher import Launch, launch
from .pages import (
    copy_buffer,
    copy_pages,
    gather_in_formats,
    gather_pages,
    merge_states,
    seal_pages,
    write_in_formats,
    write_pages,
)

__all__ = [
    "Attended",
    "Launch",
    "attend",
    "copy_buffer",
    "copy_pages",
    "dead_slots",
    "gather_in_formats",
    "gather_pages",
    "launch",
    "merge_states",
    "metal_plan",
    "seal_pages",
    "write_in_formats",
    "write_pages",
]
