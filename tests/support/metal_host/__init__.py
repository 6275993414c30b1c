"""Runs Metal compute kernels on the CPU, counts their memory traffic and finds their defects.

See README.md.
"""

from . import registers
from .buffers import HostMemory
from .compiler import MetalHostError, unsupported
from .program import Program, run
from .result import BufferCounters, Finding, Result

__all__ = [
    "BufferCounters",
    "Finding",
    "HostMemory",
    "MetalHostError",
    "Program",
    "Result",
    "registers",
    "run",
    "unsupported",
]
