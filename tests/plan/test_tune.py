"""`tune` measures thresholds, remembers them, and plans say that they were measured."""

import json

import mlx.core as mx
import pytest
from metal_on_host import metal_on_host
from paged_mlx import __main__ as commands
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.machine import thresholds, tune
from paged_mlx.machine.tune import Tuner, Workload

pytestmark = pytest.mark.native

SMALL = dict(num_q_heads=4, num_kv_heads=2, head_dim=16)


@pytest.fixture(autouse=True)
def as_before():
    yield
    for kernels in (False, True):
        for itemsize in (2, 4):
            _ext.set_plan_thresholds(kernels, itemsize, None)


def plan(context_len=512, *, stream=mx.cpu, **options):
    pages = list(range(context_len // 16))
    geometry = dict(num_q_heads=8, num_kv_heads=2, page_size=16)
    return fast.plan([pages], [context_len], **geometry, **options, stream=stream)


def measured(device="cpu", itemsize=2, **changes):
    return _ext.plan_thresholds(device == "gpu", itemsize)[0] | changes


class FakeTuner(Tuner):
    """Its clock says that a step with few items is fast, and MLX's attention if it is to be."""

    mlx_is_faster = False

    def seconds_of_both(self, *steps):
        mx.eval(*(step() for step in steps))
        self.steps = getattr(self, "steps", 0) + 2
        return tuple(map(self.seconds_of, steps))

    def seconds_of(self, step):
        if "own" in step.__code__.co_freevars:  # MLX's attention
            return 0.5 if self.mlx_is_faster else 2.0
        cells = (cell.cell_contents for cell in step.__closure__)
        (plan,) = (content for content in cells if isinstance(content, fast.AttentionPlan))
        return 1.0 + 0.1 * plan.num_merges * sum(plan.num_items.values())


def small(device, dtype=mx.float16, **options):
    decodes = (Workload(300, 1, **SMALL), Workload(70, 2, **SMALL))
    return FakeTuner(device, dtype, decodes, prompts=(8, 32), **options)


def test_the_fastest_thresholds_are_found_over_the_host_route_of_metal():
    with metal_on_host() as launches:
        tuner = small("gpu")
        found = tuner.tune()
    by_mlx = 1  # the first prompt, after which no shorter one is tried
    attended = sum(n for kernel, n in launches.kernels.items() if kernel.startswith("attend"))
    assert attended == tuner.steps - by_mlx
    with thresholds.planned_with("gpu", 2, **found), metal_on_host():
        assert plan(304, stream=None).num_merges == 0  # the clock punishes items
    assert any(line.startswith("min_item_cost") for line in tuner.lines)
    assert found["sdpa_prompt"] == 0


def test_the_cpu_is_tuned_in_the_same_way():
    tuner = small("cpu")
    found = tuner.tune()
    assert set(found) == set(thresholds.NAMES) and tuner.lines
    FakeTuner.mlx_is_faster, before = True, FakeTuner.mlx_is_faster
    try:
        assert small("cpu").tune()["sdpa_prompt"] == 8
    finally:
        FakeTuner.mlx_is_faster = before


def test_nothing_is_begun_after_the_time_is_over():
    ticks = iter(range(0, 10**9, 30))
    tuner = small("cpu", clock=lambda: next(ticks), seconds=50)
    found = tuner.tune()
    assert found == measured() and "no time" in tuner.lines[-1]


def test_real_measurements_take_less_than_the_time_given():
    tuner = Tuner("cpu", decodes=(Workload(300, 1, **SMALL),), prompts=(16,), seconds=20, rounds=1)
    assert set(tuner.tune()) == set(thresholds.NAMES)


def test_what_was_measured_is_remembered_and_a_plan_says_so(tmp_path):
    assert not plan().measured and "table's thresholds" in str(plan())
    few = measured(min_item_cost=64, min_partition=32)
    path = thresholds.remember("cpu", 2, few, tmp_path)
    assert plan().measured and "measured on this machine" in str(plan())
    assert plan(workers=8).num_items != plan(workers=8, dtype=mx.float32).num_items
    assert not plan(dtype=mx.float32).measured
    _ext.set_plan_thresholds(False, 2, None)
    assert not plan().measured
    assert thresholds.recall(tmp_path) == 1 and plan().measured
    assert json.loads(path.read_text()) == {"cpu 2": few}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing half-written is left


def test_devices_and_sizes_are_remembered_side_by_side(tmp_path):
    thresholds.remember("cpu", 2, measured(), tmp_path)
    thresholds.remember("gpu", 4, measured("gpu", 4), tmp_path)
    assert thresholds.recall(tmp_path) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"cpu 2": 3}', '{"cpu 2": {"min_partition": 1}}', '{"tpu 2": {}}'],
)
def test_a_file_that_cannot_be_used_is_ignored(tmp_path, content):
    path = thresholds.remember("cpu", 2, measured(), tmp_path)
    _ext.set_plan_thresholds(False, 2, None)
    path.write_text(content)
    assert thresholds.recall(tmp_path) == 0 and not plan().measured


@pytest.mark.parametrize(
    "name, value", [("min_partition", 0), ("min_item_cost", -1), ("items_per_worker", 1.5)]
)
def test_thresholds_that_no_plan_can_be_made_with_are_ignored(tmp_path, name, value):
    path = thresholds.remember("cpu", 2, measured(), tmp_path)
    _ext.set_plan_thresholds(False, 2, None)
    path.write_text(json.dumps({"cpu 2": measured(**{name: value})}))
    assert thresholds.recall(tmp_path) == 0


def test_another_machine_remembers_nothing_of_this_one(tmp_path, monkeypatch):
    thresholds.remember("cpu", 2, measured(), tmp_path)
    monkeypatch.setattr(thresholds, "identity", lambda: "another machine")
    assert thresholds.recall(tmp_path) == 0


def test_the_command_prints_what_it_found_and_remembers_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune.main, "__defaults__", (None, small))
    assert commands.main(["tune", "--only", "cpu", "--directory", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in thresholds.NAMES) and str(tmp_path) in printed
    assert plan().measured and len(list(tmp_path.iterdir())) == 1


def test_a_dry_run_remembers_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tune.main, "__defaults__", (None, small))
    assert commands.main(["tune", "--only", "cpu", "--dry", "--directory", str(tmp_path)]) == 0
    assert not plan().measured and list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_not_tuned(capsys, monkeypatch):
    monkeypatch.setattr(tune, "runs_kernels", lambda stream: False)
    assert commands.main(["tune", "--only", "gpu"]) == 2
    assert "nothing was measured" in capsys.readouterr().err
