"""Examples that readers copy run: the README's, and those of docstrings."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import mlx.core as mx
import paged_mlx
import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(paged_mlx.__path__, "paged_mlx.")
    if not module.name.endswith(("__main__", "_ext")) and ".mlx_lm." not in f"{module.name}."
)
if importlib.util.find_spec("mlx_lm") is not None:
    MODULES += ["paged_mlx.mlx_lm.enable", "paged_mlx.mlx_lm.explain"]


def examples_of(name):
    module = importlib.import_module(name)
    known = vars(module) | {"mx": mx, "paged_mlx": paged_mlx}
    return [t for t in doctest.DocTestFinder().find(module, extraglobs=known) if t.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_give_what_they_show(name):
    runner = doctest.DocTestRunner(verbose=False)
    said = []
    for test in examples_of(name):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_what_a_reader_meets_first_has_an_example():
    shown = {test.name for name in MODULES for test in examples_of(name)}
    for module in (paged_mlx, paged_mlx.fast):
        for name in module.__all__:
            named = getattr(module, name)
            is_error = inspect.isclass(named) and issubclass(named, Exception)
            if callable(named) and not is_error:
                assert f"{named.__module__}.{name}" in shown, name


def test_the_example_of_the_readme_plans_once_and_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    example = next(block for block in blocks if "pool.plan" in block)
    program: dict = {}
    exec(compile(example, "README.md", "exec"), program)
    mx.eval(program["out"])
    program["pool"].check([program["prompt"], *program["answers"]])
    assert program["out"].shape == (4, 8, 64)
    assert program["pool"].nbytes < 2**22, "small enough to run anywhere"


def test_dir_shows_what_is_public_and_nothing_more():
    for module in (paged_mlx, paged_mlx.fast):
        assert dir(module) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
    assert len(paged_mlx.__all__) <= 25


def test_a_pool_shows_what_a_program_uses_and_says_its_state():
    pool = paged_mlx.PagePool(2, 8, 16, 2, 64)
    paged_mlx.PageTable(16).append_tokens(20, pool.allocator)
    shown = {name for name in dir(pool) if not name.startswith("_")}
    assert {"plan", "write", "allocator", "map", "check", "tokens_stored"} <= shown
    assert not shown & {"appended", "told", "write_values"}
    assert "2 of 8 pages of 16 tokens used" in repr(pool)
