"""Several machines: ranks of ``mx.distributed`` over loopback, each a process of its own."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx_lm_ranks as ranks  # noqa: E402

# Attention in the second half of the layers alone: the rank that has the first has none.
HALF = {"num_hidden_layers": 4, "full_attention_interval": 4}


def served(
    family: str, how: str, *of_ranks: dict, scenario="serve", **options
) -> tuple[dict, list[dict]]:
    """What one process answers with the first rank's options, and what the ranks answer."""
    expected = ranks.alone(scenario, family=family, **{**options, **of_ranks[0], "late": False})
    told = [dict(family=family, how=how, **{**options, **each}) for each in of_ranks]
    found = ranks.run(scenario, *told)
    for rank, answer in enumerate(found):
        assert answer["answers"] == expected["answers"], f"rank {rank}"
        assert answer["reused"] == found[0]["reused"], f"rank {rank}"
    return expected, found


def test_a_machine_with_less_memory_forgets_for_all_of_them():
    expected, found = served("llama", "tp", {}, {"room": 16}, scenario="again")
    assert 0 < found[0]["reused"] < expected["reused"]


@pytest.mark.long
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize(
    ("family", "how", "config"),
    [
        ("llama", "tp", {}),
        ("gpt_oss", "tp", {}),
        ("deepseek_v3", "tp", {}),
        ("qwen3_5", "tp", {"vocab_size": 98}),
        ("qwen2", "pp", {}),
        ("ministral3", "pp", {}),
        ("qwen3_5", "pp", {}),
        ("qwen3_5", "pp", HALF),
    ],
)
def test_ranks_answer_as_one_machine(family, how, config, prefix_cache, late):
    options = {"config": config, "prefix_cache": prefix_cache, "late": late}
    _, found = served(family, how, options, options)
    assert (found[0]["reused"] > 0) == prefix_cache


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "how", "config"),
    [
        ("qwen3", "tp", {}),
        ("ministral3", "tp", {}),
        ("ministral3", "pp", {}),
        ("qwen3_5", "pp", {}),
        ("qwen3_5", "pp", HALF),
    ],
)
@pytest.mark.parametrize(
    "less", [{"room": 12}, {"room": 40}, {"num_pages": 24}, {"max_bytes": 40000}]
)
def test_ranks_with_less_memory_answer_as_one_machine(family, how, config, less):
    options = {"config": config, "prefix_cache": True, "requests": 8}
    more = {name: 3 * value for name, value in less.items()}
    for of_ranks in ([more, less], [less, more]):
        _, found = served(family, how, *of_ranks, **options)
        assert found[0]["reused"] > 0


@pytest.mark.long
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize(
    ("family", "how", "limits"),
    [
        ("llama", "tp", [{"num_pages": 40}, {"num_pages": 20}]),
        ("ministral3", "pp", [{"num_pages": 20}, {"num_pages": 30}]),
        ("qwen3", "tp", [{"max_bytes": 24000}, {"max_bytes": 40000}]),
        ("qwen3_5", "pp", [{"num_pages": 20, "config": HALF}, {"num_pages": 30, "config": HALF}]),
    ],
)
def test_what_has_no_pages_on_one_rank_is_refused_on_all(family, how, limits, prefix_cache):
    told = [dict(family=family, how=how, prefix_cache=prefix_cache, **each) for each in limits]
    first, second = ranks.run("refuse", *told)
    assert first == second
    short, refused, again, never, once_more, middle, batch = first["answers"]
    assert (refused, never, middle) == ("OutOfPages", "ValueError", "ended")
    assert short == again == once_more
    unlimited = ranks.alone("answers", family=family, config=limits[0].get("config"))
    assert [short, batch] == unlimited
