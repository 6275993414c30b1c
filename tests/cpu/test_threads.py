"""The threads of the CPU backend: how many, on several streams at once, and after a fork."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import paged_mlx
import pytest
from paged_mlx import fast
from paged_mlx._native import _ext

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and CPU affinity")


class Step:
    """A decode step long enough for four threads: 12 MB of K and V."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        shapes = [(2, 16, 64), (188, 8, 16, 64), (188, 8, 16, 64)]
        self.arrays = [mx.array(rng.standard_normal(shape, np.float32)) for shape in shapes]
        mx.eval(self.arrays)
        tables = np.arange(188, dtype=np.int32).reshape(2, 94)
        self.plan = fast.plan(
            tables, [1500, 1490], num_q_heads=16, num_kv_heads=8, page_size=16, workers=8
        )

    def attend(self, stream=mx.cpu) -> mx.array:
        return fast.paged_attention(*self.arrays, plan=self.plan, stream=stream)


def own_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def memory_limit(room: int, stacks: int = 0):
    """Leaves this process so many bytes of memory to ask for, and the stacks of so many threads."""
    import resource

    room += stacks * resource.getrlimit(resource.RLIMIT_STACK)[0]

    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))


IMPORTS = "from test_threads import Step, _ext, fast, memory_limit, mx, np, os, own_threads"


def printed_by(script: str) -> list[int]:
    """The integers that a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"{IMPORTS}\n{script}"],
        check=False, capture_output=True, text=True, cwd=HERE, timeout=900,  # bounds a hang, not a busy machine
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.fixture
def size():
    """Sets the number of threads; the number before comes back."""
    before = _ext.num_threads()
    yield _ext.set_num_threads
    _ext.set_num_threads(before)


@on_linux
def test_there_are_no_more_threads_than_cores_that_the_process_may_use():
    core = min(os.sched_getaffinity(0))
    all_cores, one_core = (
        printed_by("print(_ext.num_threads())")[0],
        printed_by(f"os.sched_setaffinity(0, [{core}]); print(_ext.num_threads())")[0],
    )
    assert 1 <= all_cores <= len(os.sched_getaffinity(0))
    assert one_core == 1


@on_linux
def test_a_quota_of_a_cgroup_above_the_process_counts():
    folder = Path("/sys/fs/cgroup/cpu") / f"paged_mlx_{os.getpid()}"
    try:
        (folder / "inner").mkdir(parents=True)
        (folder / "cpu.cfs_quota_us").write_text("100000")
        script = f"""
open("{folder}/inner/cgroup.procs", "w").write(str(os.getpid()))
print(_ext.num_threads())
"""
        assert printed_by(script) == [1]
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    finally:
        for path in (folder / "inner", folder):
            if path.exists():
                path.rmdir()


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None])
def test_a_number_of_threads_that_is_none_changes_nothing(n, size):
    size(3)
    with pytest.raises(ValueError, match=r"^\[set_num_threads\] n must be a whole number of at"):
        paged_mlx.set_num_threads(n)
    assert paged_mlx.num_threads() == 3
    paged_mlx.set_num_threads(2)
    assert paged_mlx.num_threads() == 2


@on_linux
@pytest.mark.parametrize("threads", [1, 4])
def test_the_stream_that_waits_is_one_of_the_threads(threads):
    before, after = printed_by(f"""
step = Step()
mx.eval(step.arrays[0] + 1)  # starts the stream
before = own_threads()
_ext.set_num_threads({threads})
for _ in range(3):
    mx.eval(step.attend())
print(before, own_threads())
""")
    assert after - before == threads - 1


@on_linux
@pytest.mark.parametrize("dtype, tokens", [("float32", 512), ("float16", 1024), ("bfloat16", 1024)])
def test_the_shortest_step_that_is_cut_wakes_a_thread(dtype, tokens):
    items, before, after = printed_by(f"""
q, pages = mx.ones((1, 32, 128), mx.{dtype}), mx.ones(({tokens // 16}, 8, 16, 128), mx.{dtype})
plan = fast.plan(
    np.arange({tokens // 16}, dtype=np.int32)[None], [{tokens}],
    num_q_heads=32, num_kv_heads=8, page_size=16, workers=2, dtype=mx.{dtype},
)
mx.eval(q + 1, pages)
before = own_threads()
_ext.set_num_threads(2)
mx.eval(fast.paged_attention(q, pages, pages, plan=plan))
print(sum(plan.num_items.values()), before, own_threads())
""")
    assert items == 2 and after - before == 1


@on_linux
def test_a_short_step_of_many_items_wakes_no_thread():
    items, before, after = printed_by("""
q, pages = mx.ones((8, 2, 32)), mx.ones((8, 2, 16, 32))
plan = fast.plan(
    np.arange(8, dtype=np.int32)[:, None], [16] * 8,
    num_q_heads=2, num_kv_heads=2, page_size=16, workers=8,
)
mx.eval(q + 1, pages)
before = own_threads()
_ext.set_num_threads(4)
mx.eval(fast.paged_attention(q, pages, pages, plan=plan, stream=mx.cpu))
print(sum(plan.num_items.values()), before, own_threads())
""")
    assert items > 1
    assert after == before


def test_streams_that_attend_at_once_change_no_bit(size):
    size(4)
    steps = [Step(seed) for seed in range(3)]
    streams = [mx.new_stream(mx.cpu) for _ in steps]
    alone = [step.attend() for step in steps]
    mx.eval(alone)
    for _ in range(20):
        outs = [step.attend(stream) for step, stream in zip(steps, streams)]
        mx.async_eval(outs)
        mx.eval(outs)
        assert all(mx.array_equal(out, expected) for out, expected in zip(outs, alone))


@on_linux
def test_the_child_of_a_fork_has_threads_of_its_own():
    same, added = printed_by("""
import signal
_ext.set_num_threads(4)
step = Step()
expected = step.attend()
mx.eval(expected)
expected = np.array(expected)
child = os.fork()
if child == 0:  # only this thread came along: neither the stream's nor the pool's
    signal.alarm(30)
    before = own_threads()
    out = step.attend(mx.new_stream(mx.cpu))
    mx.eval(out)
    same = np.array_equal(np.array(out), expected)
    print(int(same), own_threads() - before, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
""")
    assert same
    assert added == 4  # the new stream's and three of the pool's


@on_linux
def test_where_no_thread_is_to_be_had_the_others_do_the_work():
    same, added = printed_by("""
_ext.set_num_threads(1)
step = Step()
expected, out = step.attend(), step.attend()
mx.eval(expected)
before = own_threads()
memory_limit(6 << 20)  # no room for the stack of a thread
_ext.set_num_threads(4)
mx.eval(out)
print(int(np.array_equal(np.array(out), np.array(expected))), own_threads() - before)
""")
    assert same and added == 0


@on_linux
def test_a_thread_without_memory_for_its_work_fails_the_step_alone():
    failed, same = printed_by("""
_ext.set_num_threads(1)
step = Step()
expected = step.attend()
mx.eval(expected)
_ext.set_num_threads(2)
steps = [step.attend() for _ in range(200)]
memory_limit(1 << 20, stacks=1)  # the other thread can start, and gets no more
failed = 0
for out in steps:  # the other thread does not come to help every time
    try:
        mx.eval(out)
    except (MemoryError, RuntimeError):
        failed += 1
_ext.set_num_threads(1)
again = step.attend()
mx.eval(again)
print(failed, int(np.array_equal(np.array(again), np.array(expected))))
""")
    assert failed and same


def test_threads_preempted_at_any_step_of_the_pool_harm_no_job(tmp_path):
    program = tmp_path / "thread_pool_test"
    sources = [ROOT / "tests/support/cpp/thread_pool_test.cpp", ROOT / "csrc/cpu/machine.cpp"]
    flags = ["-std=c++20", "-O1", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program], check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
