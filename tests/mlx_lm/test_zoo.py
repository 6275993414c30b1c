"""Every model of mlx-lm on pages: its tokens are those of mlx-lm's own caches."""

import contextlib

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_compare as compare  # noqa: E402
import mlx_lm_table as table  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from paged_mlx.mlx_lm import enable, explain, versions  # noqa: E402

COMMITTED = table.committed()
RECURRENT = "ArraysCache holds no pages of K and V"


@pytest.fixture(autouse=True)
def uncompiled():
    """Without ``mx.compile``: on a CPU it runs a C++ compiler for each new function."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def assert_right(report):
    assert report.problems == {mode: [] for mode in compare.MODES}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_single_batched_and_speculative_answers_are_stocks_and_read_pages_as_the_table_says(family):
    report = compare.report(family)
    assert_right(report)
    if table.is_of_this_mlx_lm():
        assert report.cells == COMMITTED[family][: len(report.cells)]


@pytest.mark.long
@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.VARIANTS])
def test_models_and_variants_speculate_with_themselves_too(name):
    assert_right(compare.report(name, thorough=True))


@pytest.mark.long
@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_no_page_size_changes_an_answer(family, page_size):
    assert_right(compare.report(family, page_size=page_size))


@pytest.mark.parametrize("family", list(zoo.NO_KV))
def test_a_model_without_k_and_v_is_refused(family):
    with contextlib.suppress(RuntimeError):  # it needs Metal
        model = zoo.tiny(family)
        with pytest.raises(ValueError, match="must have a cache of K and V"):
            enable(model)


def test_every_model_of_mlx_lm_has_a_row_in_the_table():
    missing = set(zoo.installed()) - set(COMMITTED)
    assert not missing, f"{table.COMMAND} makes their rows"
    if table.is_of_this_mlx_lm():
        assert list(COMMITTED) == zoo.installed()


def test_the_table_is_of_the_newest_mlx_lm_that_is_tested():
    assert table.made_with() == versions.TESTED[-1]


@pytest.mark.parametrize("family", ["gemma3n", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_explain_says_what_the_table_says(family):
    layers = [layer for layer in explain(zoo.tiny(family)).layers if layer.reason != RECURRENT]
    paged = sum(layer.is_paged for layer in layers)
    assert f"{paged / len(layers):.0%}" == COMMITTED[family][3]
