"""``python -m paged_mlx doctor``: is paged attention right on this machine?

Every kernel runs on small problems and is compared with a float64 oracle: on the GPU if
there is one, on the CPU with every instruction set it has, and, in a checkout, the text of
the Metal kernels on the host. Prints a table; exits with 1 if anything is wrong.
"""

import argparse
import contextlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import product
from pathlib import Path

import mlx.core as mx

from paged_mlx._native import _ext
from paged_mlx.reference.dtypes import NAMES
from paged_mlx.testing import Backend, Case, Check, backends, report, run_suite, small
from paged_mlx.testing.runner import Report

REPORT = "paged_mlx_doctor.json"
HEAD_DIMS = (64, 80, 128, 256, 512)


@dataclass(frozen=True)
class Examination:
    """One backend, and what is asked of it.

    Attributes:
        inside: What must be entered while it runs.
    """

    backend: Backend
    checks: list[Check]
    inside: contextlib.AbstractContextManager = field(default_factory=contextlib.nullcontext)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    about = environment()
    print("\n".join(f"{name:<10} {value}" for name, value in about.items()) + "\n")
    result = examine(list(examinations(options.only)))
    print(report.table(result))
    print("\n" + _verdict(result))
    path = options.json or (None if result.right else REPORT)
    if path:
        Path(path).write_text(report.to_json(result, **about) + "\n")
        print(f"The report to attach to an issue: {path}")
    return 0 if result.right else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paged_mlx doctor", description=__doc__)
    parser.add_argument(
        "--json", metavar="FILE", help=f"write a report; without it only of failures, to {REPORT}"
    )
    parser.add_argument(
        "--only",
        choices=("metal", "cpu", "host"),
        help="the GPU, the CPU, or Metal text on the host",
    )
    return parser.parse_args(arguments)


def environment() -> dict[str, str]:
    """What an issue must say: versions, machine, GPU."""
    about = {
        "paged_mlx": _version("paged_mlx"),
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "system": _system(),
        "cpu": f"{platform.machine()}, {_ext.num_threads()} threads, {_ext.isa()}",
        "gpu": "none that MLX can use",
    }
    if mx.metal.is_available():
        gpu = mx.device_info()
        memory = gpu.get("memory_size", 0) / 2**30
        about["gpu"] = (
            f"{gpu.get('device_name')}, {gpu.get('architecture')}, "
            f"{_ext.gpu_cores()} cores, {memory:.0f} GiB"
        )
    return about


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed, run from its folder"


def _system() -> str:
    mac = platform.mac_ver()[0]
    return f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"


def examinations(only: str | None = None) -> Iterator[Examination]:
    """Every backend that this machine has."""
    if only in (None, "metal") and (gpu := backends.metal()) is not None:
        yield Examination(gpu, [*bodies(), *small.checks()])
    if only in (None, "cpu"):
        for isa in _ext.isa_names() or [""]:
            cpu = replace(backends.cpu(), name=f"cpu {isa}".strip())
            yield Examination(cpu, [*bodies(), *small.checks()], _instruction_set(isa))
    if only in (None, "host") and (on_host := _metal_on_host()) is not None:
        cpu = replace(backends.cpu(), name="metal text on the host")
        yield Examination(cpu, one_of_each(), on_host())


def examine(patients: list[Examination]) -> Report:
    """Run every examination; one report of all."""
    whole = Report()
    for patient in patients:
        with patient.inside:
            part = run_suite(patient.checks, [patient.backend], shrink_seconds=3)
        whole.cells += part.cells
    return whole


def bodies() -> Iterator[Check]:
    """Every body of attention and the merge, for every type and the usual head dims."""
    for dtype, head_dim in product(NAMES, HEAD_DIMS):
        case = Case(dtype=dtype, head_dim=head_dim, num_kv_heads=2, sequences=((1, 90), (1, 33)))
        for gqa_factor in (1, 2):
            yield Check("vector body", case.replace(num_q_heads=2 * gqa_factor))
        for gqa_factor in (4, 8, 16):
            yield Check("tile body", case.replace(num_q_heads=2 * gqa_factor))
        for gqa_factor in (1, 4):
            prompts = case.replace(num_q_heads=2 * gqa_factor, sequences=((40, 90), (33, 33)))
            yield Check("wide body", prompts)
        long = case.replace(num_q_heads=8, sequences=((1, 300), (1, 33)))
        yield Check("partitions, merge", long, "neighbours")


def one_of_each() -> list[Check]:
    """Each kernel once, for a backend that compiles for seconds."""
    case = Case(dtype="float16", num_kv_heads=2, sequences=((1, 90), (1, 33)))
    wide = case.replace(dtype="float32", num_q_heads=8, sequences=((20, 60),))
    pages = case.replace(page_size=8)
    return [
        Check("vector body", case.replace(num_q_heads=4)),
        Check("tile body", case.replace(dtype="bfloat16", num_q_heads=8)),
        Check("wide body", wide),
        Check(
            "partitions, merge", case.replace(num_q_heads=8, sequences=((1, 150),)), "neighbours"
        ),
        Check("numbers", case, "merge"),
        *(Check("pages", pages, ask) for ask in ("write", "copy", "gather")),
    ]


@contextlib.contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    before = _ext.isa()
    _ext.set_isa(name)
    try:
        yield
    finally:
        _ext.set_isa(before)


def _metal_on_host():
    """The context manager of a checkout's tests, if this is one and it works here."""
    tests = Path(__file__).resolve().parents[2] / "tests/support"
    if not (tests / "metal_on_host.py").is_file():
        return None
    sys.path.insert(0, str(tests))
    try:
        from metal_host.compiler import unsupported
        from metal_on_host import metal_on_host
    except ImportError:
        return None
    finally:
        sys.path.remove(str(tests))
    return None if unsupported() else metal_on_host


def _verdict(result: Report) -> str:
    cases = sum(cell.cases for cell in result.cells)
    seconds = sum(cell.seconds for cell in result.cells)
    if result.right:
        return f"All right: {cases} checks in {seconds:.0f} s."
    return report.failures(result)
