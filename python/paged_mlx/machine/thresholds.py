"""The planner's thresholds as ``python -m paged_mlx tune`` measured them on this machine.

The table of defaults is ``csrc/plan/targets.cpp``.
"""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from paged_mlx._native import _ext
from paged_mlx.machine.cache import cache_directory, machine_file, read_dict, write_dict

NAMES = tuple(_ext.plan_thresholds(False, 2)[0])


def identity() -> str:
    """The machine and the versions that measurements hold for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.machine()}, {platform.processor()}, {cores} cores, {_ext.isa()}"
    if mx.metal.is_available():
        machine += f", {mx.device_info().get('device_name')}, {_ext.gpu_cores()} cores"
    return f"{machine}, {platform.system()} {platform.release()}, mlx {mx.__version__}"  # type: ignore[attr-defined]


def remember(device: str, itemsize: int, measured: dict[str, int], directory: Path | None = None):
    """Plan with ``measured`` from now on, in later processes too.

    Args:
        device: ``"gpu"`` or ``"cpu"``.
        itemsize: Bytes of an element, 2 or 4.
        measured: A value for each of ``NAMES``.
        directory: Where it is remembered. None: the user's cache.

    Returns:
        The file.

    Raises:
        OSError: The cache cannot be written.
    """
    _ext.set_plan_thresholds(device == "gpu", itemsize, measured)
    path = machine_file(directory or cache_directory("tuned"), identity())
    write_dict(path, read_dict(path) | {f"{device} {itemsize}": measured})
    return path


def recall(directory: Path | None = None) -> int:
    """Plan with what was remembered for this machine; how many devices and sizes that were."""
    directory = directory or cache_directory("tuned")
    if not directory.is_dir():
        return 0
    found = 0
    for key, measured in read_dict(machine_file(directory, identity())).items():
        device, _, itemsize = key.partition(" ")
        if device in ("cpu", "gpu") and itemsize in ("2", "4") and _whole(measured):
            _ext.set_plan_thresholds(device == "gpu", int(itemsize), measured)
            found += 1
    return found


def _whole(measured: object) -> bool:
    """Whether it is a threshold for each name, such as a plan can be made with."""
    return (
        isinstance(measured, dict)
        and set(measured) == set(NAMES)
        and all(type(value) is int and 0 <= value < 2**31 for value in measured.values())
        and all(measured[n] for n in NAMES if n not in ("sdpa_prompt", "least_workers_per_core"))
    )


@contextmanager
def planned_with(device: str, itemsize: int, **changes: int):
    """Plans made inside have these thresholds in place of the present ones."""
    kernels = device == "gpu"
    present, were_measured = _ext.plan_thresholds(kernels, itemsize)
    _ext.set_plan_thresholds(kernels, itemsize, present | changes)
    try:
        yield
    finally:
        _ext.set_plan_thresholds(kernels, itemsize, present if were_measured else None)
