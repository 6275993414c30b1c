"""Long work is several nodes of the graph, and not a bit of the result tells how many."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import fast
from paged_mlx._native import _ext

HEADS, PAGE, DIM = 2, 8, 64


@contextlib.contextmanager
def nodes_of(multiply_adds):
    _ext.set_node_work(multiply_adds)
    try:
        yield
    finally:
        _ext.set_node_work(0)


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float16))


def count_nodes(tmp_path, *arrays):
    """Nodes of attention below some arrays."""
    mx.export_to_dot(str(tmp_path / "graph.dot"), *arrays)
    text = (tmp_path / "graph.dot").read_text()
    return text.count('"PagedAttention"') + text.count('"WriteAttend"')


class Step:
    """A prompt's last 40 tokens, two sequences that decode, and short runs of 2 and 4 tokens."""

    lens, starts = [90, 90, 5, 60, 70], [0, 40, 41, 42, 44, 48]

    def __init__(self, fixed_partition=4096):
        table = np.arange(60, dtype=np.int32).reshape(5, 12)
        self.plan = fast.plan(
            table, self.lens, num_q_heads=4, num_kv_heads=HEADS, page_size=PAGE,
            cu_seqlens_q=self.starts, fixed_partition=fixed_partition, dtype=mx.float16,
        )  # fmt: skip
        k_pages, v_pages = (
            normal(60, HEADS, PAGE, DIM, seed=1),
            normal(60, HEADS, PAGE, DIM, seed=2),
        )
        mx.eval(k_pages, v_pages)
        self.pages = k_pages, v_pages
        self.q = normal(self.starts[-1], 4, DIM, seed=3)

    def attend(self):
        return _ext.paged_attention(self.q, self.pages, self.plan.array, DIM**-0.5)

    def write_attend(self):
        k, v = normal(1, HEADS, 3, DIM, seed=4), normal(1, HEADS, 3, DIM, seed=5)
        slots = mx.array([0, 100, 200], mx.int32)
        mx.eval(slots)
        q = self.q.transpose(1, 0, 2)[None]
        return _ext.write_attend(
            q, *self.pages, self.plan.array, k, v, slots, DIM**-0.5, None, None
        )


@pytest.mark.parametrize("fixed_partition", [4096, 32])
@pytest.mark.parametrize("call", ["attend", "write_attend"])
def test_nodes_of_a_cut_plan_give_the_bits_of_one_node(tmp_path, call, fixed_partition):
    libraries = []

    def record(dispatch):
        libraries.append(dispatch["library"])
        return dispatch

    with metal_on_host(change=record) as launches:
        step = Step(fixed_partition)
        assert bool(step.plan.num_partials) == (fixed_partition == 32)
        outputs = getattr(step, call)()
        assert count_nodes(tmp_path, *outputs) == 1
        mx.eval(outputs)
        whole = [np.array(x) for x in outputs]
        one_node, of_one_node = dict(launches.kernels), set(libraries)
        libraries.clear()
        with nodes_of(1):
            step = Step(fixed_partition)
            outputs = getattr(step, call)()
        items = len(step.plan.items)
        assert count_nodes(tmp_path, *outputs) == items > 3
        mx.eval(outputs)
    assert launches.findings == [] and set(libraries) == of_one_node
    for a, b in zip(outputs, whole, strict=True):
        np.testing.assert_array_equal(np.array(a), b)
    attends = {name: n for name, n in one_node.items() if name.startswith("attend")}
    cut = {name: n - one_node[name] for name, n in launches.kernels.items()}
    assert sum(cut[name] for name in attends) == items
    # Only the first node writes, and only the last one merges.
    assert {name: n for name, n in cut.items() if name not in attends} == {
        name: n for name, n in one_node.items() if name not in attends
    }


def test_a_node_ends_once_it_holds_its_work(tmp_path):
    with metal_on_host():
        step = Step()
        work = [
            (item["keys"][1] - item["keys"][0]) * len(item["tokens"]) * 4 * 2 * DIM
            for item in step.plan.items
        ]
        with nodes_of(sum(work)):
            assert count_nodes(tmp_path, *step.attend()) == 1
        with nodes_of(sum(work) - 1):
            assert count_nodes(tmp_path, *step.attend()) == 1 + (sum(work[:-1]) >= sum(work) - 1)
        with nodes_of(work[0]):
            expected, held = 1, 0
            for item in work:
                if held >= work[0]:
                    expected, held = expected + 1, 0
                held += item
            assert count_nodes(tmp_path, *step.attend()) == expected > 1


def test_the_cpu_backend_takes_one_node(tmp_path):
    with nodes_of(1):
        assert count_nodes(tmp_path, *Step().attend()) == 1


def test_a_write_waits_for_every_node_that_reads(tmp_path):
    with metal_on_host(), nodes_of(1):
        step = Step()
        out, _, *pages = step.attend()
        k = mx.zeros((96, HEADS, DIM), mx.float16)
        later = _ext.write_pages([k, k], pages, mx.arange(96, dtype=mx.int32), alias=True)
        mx.eval(later[0])  # the write alone is asked for
        expected = np.array(out)
    with nodes_of(0):
        np.testing.assert_allclose(expected, np.array(Step().attend()[0]), atol=2e-3)


def test_nodes_made_for_kernels_run_without_them(tmp_path):
    with metal_on_host(), nodes_of(1):
        steps = Step(32).attend()[0], Step(32).write_attend()[0]
        assert count_nodes(tmp_path, *steps) > 6
    got = [np.array(x) for x in steps]
    wanted = [np.array(Step(32).attend()[0]), np.array(Step(32).write_attend()[0])]
    for a, b in zip(got, wanted, strict=True):  # of plans for two machines
        np.testing.assert_allclose(a, b, atol=2e-3)
