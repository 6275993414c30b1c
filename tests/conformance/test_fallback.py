"""MLX's own operations stand in for the native module: all of it, and with right results."""

import inspect
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from paged_mlx import _native, fallback

ROOT = Path(__file__).parents[2]


def test_everything_that_the_package_takes_from_the_native_module_has_a_stand_in():
    sources = (ROOT / "python/paged_mlx").rglob("*.py")
    taken = {
        name for path in sources for name in re.findall(r"\b_ext\.([a-z]\w+)", path.read_text())
    }
    assert "paged_attention" in taken
    assert {name for name in taken if not hasattr(fallback, name)} == set()


@pytest.mark.native
@pytest.mark.parametrize("name", ["NativePlan", "Fetches", "FetchTables"])
def test_a_stand_in_has_every_method(name):
    native, stand_in = (getattr(module, name) for module in (_native._ext, fallback))
    methods = {method for method in dir(native) if not method.startswith("_")}
    assert methods and methods - set(dir(stand_in)) == set()


@pytest.mark.native
def test_a_stand_in_takes_the_arguments_of_the_native_function():
    compared = []
    for name in (
        *dir(_native._ext),
        "NativePlan.__init__",
        "Fetches.fetch",
        "FetchTables.__init__",
    ):
        if not hasattr(fallback, name.partition(".")[0]):
            continue
        native, stand_in = map(operator.attrgetter(name), (_native._ext, fallback))
        if hasattr(native, "__nb_signature__") and not isinstance(native, type):
            ((text, *_),) = native.__nb_signature__
            expected = {*re.findall(r"(\w+): ", text.partition(" -> ")[0])} - {"stream"}
            takes = inspect.signature(stand_in).parameters
            if not any(p.kind is p.VAR_POSITIONAL for p in takes.values()):  # takes any
                compared.append(name)
                assert expected == {*takes} - {"self"}, name
    assert {"paged_attention", "pool_memory", "NativePlan.__init__"} <= {*compared}


def test_a_tracer_is_known_and_nothing_is_evaluated():
    given = mx.ones((2, 3))
    told = []

    @mx.compile
    def traced(x):
        told.extend(map(fallback.is_tracer, (x, x + 1, given, given + 1)))
        return x

    traced(given)
    assert told == [True, True, False, False]
    big = mx.ones((1024, 1024)) + 1
    before = mx.get_active_memory()
    assert not fallback.is_tracer(big)
    assert mx.get_active_memory() == before


def test_without_compiling_no_array_is_a_tracer():
    mx.disable_compile()
    try:
        assert not fallback.is_tracer(mx.ones(3))
    finally:
        mx.enable_compile()


def test_a_tracer_that_outlives_its_trace_is_stale():
    kept = []

    @mx.compile
    def traced(x):
        kept.append(x)
        return mx.array(float(fallback.is_tracer(x) and not fallback.is_stale(x)))

    assert traced(mx.ones(3)) == 1
    assert fallback.is_stale(kept[0]) and not fallback.is_stale(mx.ones(3))


def test_every_write_that_copies_pages_is_counted():
    pages = mx.zeros((64, 2, 16, 64))
    token = mx.ones((1, 2, 64))
    mx.eval(pages, token)
    versions, before = [(pages, pages)], fallback.buffer_copies()
    memory = mx.get_active_memory()
    for slot in range(3):
        slots = mx.array([slot], mx.int32)
        versions.append(fallback.write_pages([token] * 2, versions[-1], slots))
    mx.eval(versions)  # every version is held, so each is a copy
    assert (mx.get_active_memory() - memory) // pages.nbytes == 6
    assert fallback.buffer_copies() - before == 6
    assert [int(k.sum()) // 128 for k, _ in versions] == [0, 1, 2, 3]


@pytest.mark.native
@pytest.mark.parametrize(
    "program",
    [
        "from paged_mlx.testing.__main__ import main\n"
        "assert main(['--run', 'small', '--backend', 'cpu']) == 0",
        "import pytest; pytest.importorskip('mlx_lm')\n"
        "import mlx_lm_zoo as zoo\n"
        "model, prompt = zoo.tiny('gemma3_text'), zoo.prompt(45, seed=3)\n"
        "expected = zoo.single(model, prompt, max_tokens=16)\n"
        "with paged_mlx.enable(model, page_size=8) as paged:\n"
        "    assert zoo.single(model, prompt, max_tokens=16) == expected\n"
        "    assert paged.groups",
    ],
    ids=["small suite", "a model of mlx-lm"],
)
def test_without_a_native_module_results_are_right(program):
    hidden = "import without_native, paged_mlx; assert paged_mlx.backend().startswith('fallback')\n"
    path = os.pathsep.join([str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", hidden + program],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
