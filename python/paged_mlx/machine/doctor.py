"""``paged-mlx doctor``: is paged attention right on this machine?

Every kernel runs on small problems and is compared with a float64 oracle: on the GPU if
there is one, on the CPU with every instruction set it has, and, in a checkout, the text of
the Metal kernels on the host. On a GPU it also tries a long prompt and random graphs, and times
decode and prompts beside MLX's attention. Prints a table; exits with 1 if anything is wrong and
with 2 if there was nothing to check.
"""

import argparse
import contextlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx

from paged_mlx._native import BUILT, _ext, backend, on_path
from paged_mlx.machine.cache import check_writable, write_whole
from paged_mlx.machine.cold_start import MODELS, first_token
from paged_mlx.machine.doctor_on_gpu import TO_LOOK_AT, Finding, trials
from paged_mlx.machine.routes import in_words, kernel_routes
from paged_mlx.reference.case import with_options
from paged_mlx.reference.dtypes import NAMES
from paged_mlx.testing import Backend, Case, Check, backends, report, run_suite, small
from paged_mlx.testing.runner import Report

REPORT = "paged_mlx_doctor.json"
EXAMPLES = """\
examples:
  paged-mlx doctor
  paged-mlx doctor --only metal --all --json report.json     to attach to an issue
"""
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
    """Run the command; 0: all right, 1: something is wrong, 2: there was nothing to check."""
    options = _parse(arguments)
    if options.json not in (None, "-"):
        check_writable(Path(options.json))
    about = environment()
    say = (lambda *_: None) if options.json == "-" else print
    say("\n".join(f"{name:<10} {value}" for name, value in about.items()) + "\n")
    patients = list(examinations(options.only, options.all))
    if not patients:
        print("No checks: " + _NOTHING[options.only], file=sys.stderr)
        return 2
    result = examine(patients)
    say(report.table(result))
    findings = [
        *(_compiled() if BUILT else ()),
        *(gpu_trials() if options.only in (None, "metal") else ()),
    ]
    say("\n" + "\n".join(f"{f.name}: {f.result}{_mark(f.right)}" for f in findings))
    right = result.right and not any(finding.right is False for finding in findings)
    say("\n" + _verdict(result, right))
    if not mx.metal.is_available():
        say("\nOn a Mac, look at:\n" + "\n".join(f"- {what}: {how}" for what, how in TO_LOOK_AT))
    ran = kernel_routes()
    say("\nWhat ran:\n" + in_words(ran))
    text = report.to_json(
        result, **about, routes=ran, measured=[asdict(finding) for finding in findings]
    )
    if options.json == "-":
        print(text)
    elif path := options.json or (None if right else REPORT):
        write_whole(Path(path), text + "\n")
        say(f"The report to attach to an issue: {path}")
    return 0 if right else 1


def _mark(right: bool | None) -> str:
    return "  WRONG" if right is False else ""


_NOTHING = {
    None: "there is no backend here.",
    "metal": "MLX finds no GPU on this machine. `--only host` runs the Metal text on the CPU.",
    "cpu": "there is no CPU backend for this processor.",
    "host": "the Metal text runs on the host from a checkout only, with a C++ compiler.",
}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="paged-mlx doctor", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help=f"write a report, without FILE to the screen and nothing else; by default only of failures, to {REPORT}",
    )
    parser.add_argument(
        "--all", action="store_true", help="every type and head_dim: compiles for minutes on a GPU"
    )
    parser.add_argument(
        "--only",
        choices=("metal", "cpu", "host"),
        help="the GPU, the CPU, or Metal text on the host",
    )
    return parser.parse_args(arguments)


def gpu_trials() -> Iterator[Finding]:
    """What only a GPU can tell; nothing where there is none."""
    if (gpu := backends.metal()) is not None:
        yield from trials(gpu)


def _compiled() -> Iterator[Finding]:
    """What models have compiled before their first token."""
    for name, model in MODELS.items():
        yield Finding(f"compiled for the first token of {name}", str(first_token(model)))


def environment() -> dict[str, str]:
    """What an issue must say: versions, machine, GPU."""
    about = {
        "paged_mlx": _version("paged_mlx"),
        "mlx": _version("mlx"),
        "backend": backend(),
        "python": platform.python_version(),
        "system": _system(),
        "cpu": f"{platform.machine()}, {_ext.num_threads()} threads, {_ext.isa()}",
        "gpu": "none that MLX can use",
    }
    if len(places := on_path()) > 1:
        others = ", ".join(f"{version} in {place}" for version, place in places)
        about["mlx"] += f"; more than one is on the path, leave one of them: {others}"
    if mx.metal.is_available():
        gpu = mx.device_info()
        memory = int(gpu.get("memory_size", 0)) / 2**30
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


def examinations(only: str | None = None, everything: bool = False) -> Iterator[Examination]:
    """Every backend that this machine has."""
    if only in (None, "metal") and (gpu := backends.metal()) is not None:
        yield Examination(gpu, [*bodies(), *small.checks()] if everything else usual())
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
    progress = report.ProgressLine(sum(len(patient.checks) for patient in patients))
    for patient in patients:
        with patient.inside:
            part = run_suite(patient.checks, [patient.backend], shrink_seconds=3, progress=progress)
        whole.cells += part.cells
    progress.end()
    return whole


def usual() -> list[Check]:
    """What models of today run, for a GPU, which compiles each kernel anew."""
    case = Case(dtype="bfloat16", num_kv_heads=2, sequences=((1, 90), (1, 33)))
    checks = [
        check
        for check in bodies()
        if (check.case.dtype == "bfloat16" and check.case.head_dim in (64, 128, 256))
        or (check.case.dtype != "bfloat16" and check.case.head_dim == 128)
    ]
    one_each: list[Any] = [
        *([i == j for j in range(3)] + [None] for i in range(3)),
        *([False, False, False, mask] for mask in ("boolean", "additive")),
    ]
    options = (
        dict(sliding_window=20), *(with_options(*kinds) for kinds in one_each),
        dict(ragged=True), dict(poison="nan"),
    )  # fmt: skip
    for changes in options:
        checks.append(Check("options", case.replace(num_q_heads=8, head_dim=128, **changes)))
    checks.append(Check("numbers", case, "merge"))
    checks += [
        Check("pages", case.replace(head_dim=128), ask) for ask in ("write", "copy", "gather")
    ]
    long = case.replace(head_dim=128, page_size=64, sequences=((1, 200), (1, 33)))
    for k_format, v_format in (("q8", "q8"), ("q8", "q4"), ("q4", "q4")):
        own = long.replace(k_format=k_format, v_format=v_format)
        checks += [Check("formats", own.replace(num_q_heads=heads)) for heads in (2, 16)]
    return checks


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
            yield Check("prompts", prompts)
        long = case.replace(num_q_heads=8, sequences=((1, 300), (1, 33)))
        yield Check("partitions, merge", long, "neighbours")


def one_of_each() -> list[Check]:
    """Each kernel once, for a backend that compiles for seconds."""
    case = Case(dtype="float16", num_kv_heads=2, sequences=((1, 90), (1, 33)))
    prompts = case.replace(dtype="float32", num_q_heads=8, sequences=((20, 60),))
    pages = case.replace(page_size=8)
    return [
        Check("vector body", case.replace(num_q_heads=4)),
        Check("tile body", case.replace(dtype="bfloat16", num_q_heads=8)),
        Check("prompts", prompts),
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
    tests = Path(__file__).resolve().parents[3] / "tests/support"
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


def _verdict(result: Report, right: bool) -> str:
    cases = sum(cell.cases for cell in result.cells)
    seconds = sum(cell.seconds for cell in result.cells)
    if result.right and not right:
        return f"{cases} checks are right, what was tried beside them is not."
    if result.right:
        return f"All right: {cases} checks in {seconds:.0f} s."
    return report.failures(result)
