"""The chapter's comparison of memory systems runs, agrees with itself and says what it measured."""

import mlx.core as mx
import pytest
from paged_mlx import benchmark_memory_systems
from paged_mlx.course.memory_systems import SCENARIOS, DecodeStep

SMALL = dict(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=4, dtype=mx.float32)


def test_the_three_scenarios_are_the_chapters():
    assert [s["name"] for s in SCENARIOS] == ["Short sequences", "Mixed lengths", "Long sequences"]
    assert [len(s["lengths"]) for s in SCENARIOS] == [30, 32, 18]
    assert [sum(s["lengths"]) for s in SCENARIOS] == [3000, 28800, 36000]


def test_contiguous_gathered_and_paged_attention_agree():
    step = DecodeStep([5, 16, 33], **SMALL)
    paged = step.paged()
    assert mx.allclose(paged, step.traditional(), atol=1e-5)
    assert mx.allclose(paged, step.naive_gather(), atol=1e-5)


def test_each_scenario_is_printed_and_returned(capsys):
    scenarios = [{"name": "Tiny", "lengths": [3, 9]}, {"name": "Alike", "lengths": [8, 8]}]
    tiny, alike = benchmark_memory_systems(scenarios, repeats=1, **SMALL)
    printed = capsys.readouterr().out
    assert "Tiny:\n  Traditional: " in printed and "Alike:\n" in printed
    on_cpu = mx.default_device() == mx.cpu
    assert ("these speed-ups are not those of a GPU" in printed) == on_cpu
    assert tiny.traditional_bytes == 2 * 9 * 2 * 2 * 16 * 4  # two rows padded to nine tokens
    assert tiny.paged_bytes == (1 + 3) * 4 * 2 * 2 * 16 * 4  # pages of four tokens
    assert alike.traditional_bytes == alike.paged_bytes
    assert tiny.speedup == tiny.traditional_seconds / tiny.paged_seconds


def test_a_difference_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(DecodeStep, "paged", lambda step: step.traditional() + 1)
    with pytest.raises(AssertionError, match="differ by"):
        benchmark_memory_systems([{"name": "Tiny", "lengths": [3]}], repeats=1, **SMALL)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"scenarios": [{"name": "None", "lengths": []}]},
            "lengths of 'None' must not be empty; got none",
        ),
        ({"scenarios": [{"lengths": [3]}]}, "scenarios must have a name and lengths"),
        ({"scenarios": [{"name": "Zero", "lengths": [0]}]}, "lengths of 'Zero' must be a whole"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1; got 0"),
        ({"layers": 3}, "geometry must be sizes of DecodeStep; got "),
    ],
)
def test_a_wrong_argument_is_refused(change, message):
    arguments = {"scenarios": [{"name": "Tiny", "lengths": [3]}]} | change
    with pytest.raises(ValueError, match=rf"^\[benchmark_memory_systems\] {message}"):
        benchmark_memory_systems(**arguments)
