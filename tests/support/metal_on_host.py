"""Evaluate with the Metal launch code and the kernels' text, on this machine's CPU.

Inside ``metal_on_host()`` every operation of paged_mlx goes Python -> C++ -> launch code ->
kernel text -> numbers, the kernels run by :mod:`metal_host`.
"""

import ctypes
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager

import mlx.core as mx
import pytest
from metal_contract import judge
from metal_host import HostMemory, Program, unsupported
from paged_mlx._native import BUILT, _ext

_PERTURB = -6  # of mallopt: memory is filled with the complement of a byte, 0x7f
_programs: dict[str, Program] = {}  # by text
_texts: dict[str, str] = {}  # of each library


class Launches:
    """What has been launched, and what the instrument found.

    Attributes:
        kernels: Dispatches of each kernel.
        findings: Defects and failed launches, as text.
        results: The results of instrumented launches, by kernel, newest last.
    """

    def __init__(self, instrument: bool, change: Callable[[dict], dict] | None):
        self.instrument = instrument
        self.change = change
        self.kernels: Counter[str] = Counter()
        self.findings: list[str] = []
        self.results: dict[str, list] = {}
        self._judge = judge.Judge() if judge.is_loaded() else None

    def __call__(self, dispatch: dict) -> None:
        if _texts.setdefault(dispatch["library"], dispatch["text"]) != dispatch["text"]:
            self.findings.append(f"two texts are called {dispatch['library']}")
        try:
            self._launch(self.change(dispatch) if self.change else dispatch)
        except Exception as error:
            self.findings.append(str(error))
            raise

    def _launch(self, dispatch: dict) -> None:
        text = dispatch["text"]
        program = _programs.get(text)
        if program is None:
            program = _programs[text] = Program(text)
        buffers = {i: HostMemory(*memory) for i, memory in dispatch["buffers"].items()}
        result = program.run(
            dispatch["kernel"],
            buffers | dispatch["bytes"],
            groups=dispatch["groups"],
            group=dispatch["group"],
            constants=dispatch["constants"],
            instrument=self.instrument,
        )
        self.kernels[dispatch["kernel"]] += 1
        if self._judge:
            self._judge.add(dispatch, program, result if self.instrument else None)
        self.findings += [finding.text for finding in result.errors]
        if self.instrument:
            self.results.setdefault(dispatch["kernel"], []).append(result)

    def finish(self) -> None:
        """Add to the findings what broke MLX's contract, where its stand-in plays."""
        if self._judge:
            self.findings += self._judge.finish()


@contextmanager
def metal_on_host(
    instrument: bool = True,
    change: Callable[[dict], dict] | None = None,
):
    """Run all operations on the CPU device through the Metal launch code.

    Args:
        instrument: Watch memory, races and barriers; without it only numbers come out.
        change: ``dispatch -> dispatch``: what is launched in place of a dispatch.

    Yields:
        The :class:`Launches` so far; its findings are complete once the block is left.

    A machine that cannot do this skips the test.
    """
    if unsupported():
        pytest.skip(unsupported())
    if not BUILT:
        pytest.skip("launch code is part of the native module")
    mx.synchronize()
    launches = Launches(instrument, change)
    _ext.set_host_launch(launches)
    _fill_fresh_memory(True)
    try:
        yield launches
        mx.synchronize()
    finally:
        _fill_fresh_memory(False)
        _ext.set_host_launch(None)
        launches.finish()


def _fill_fresh_memory(on: bool) -> None:
    """Outputs and partial results begin as huge numbers: one that nobody writes shows.

    glibc alone fills what it hands out; elsewhere memory is as it comes.
    """
    fill = getattr(ctypes.CDLL(None), "mallopt", None)
    if fill is not None:
        fill(_PERTURB, 0x80 if on else 0)
