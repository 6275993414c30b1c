"""The first use of a kernel on a GPU: proven once, remembered, and replaced when it is wrong.

The GPU is the host, which runs the kernels' text; a fault is planted in that text.
"""

import json
import re
import warnings

import mlx.core as mx
import numpy as np
import pytest
from first_use_gpu import gpu, wrong
from metal_host import Program
from metal_on_host import metal_on_host
from paged_mlx import PagePool, fast, operations
from paged_mlx._native import _ext
from paged_mlx.formats.page_format import PageFormats
from paged_mlx.machine import first_use
from paged_mlx.machine.first_use import Guard, Variant
from paged_mlx.options import AttentionOptions, OptionKinds
from paged_mlx.testing import Case, backends

CASE = Case(
    dtype="float16", num_q_heads=4, num_kv_heads=2, page_size=8, sequences=((1, 20), (1, 9))
)


def attend(case=CASE, **options):
    problem = case.build()
    arguments, own = backends.op_arguments(problem)
    out, lse = fast.paged_attention(*arguments, **own, **options, return_lse=True)
    return problem.judge(np.array(out.astype(mx.float32)), np.array(lse))


def remembered(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_a_right_kernel_is_proven_once_and_then_only_looked_up(tmp_path):
    with gpu(tmp_path) as launches:
        assert attend().right
        proven = launches.kernels["attend_vector"]
        assert attend().right
        assert (proven, launches.kernels["attend_vector"]) == (2, 3)
    (name,) = remembered(tmp_path)
    assert "rows=2" in name and remembered(tmp_path)[name] is True


def test_a_later_process_on_the_same_gpu_proves_nothing_again(tmp_path):
    with gpu(tmp_path):
        attend()
    with gpu(tmp_path) as launches:
        assert attend().right and launches.kernels["attend_vector"] == 1
    with gpu(tmp_path, name="another GPU") as launches:
        assert attend().right and launches.kernels["attend_vector"] == 2


def test_a_wrong_kernel_is_replaced_loudly_and_its_verdict_is_forgotten(tmp_path, caplog):
    with gpu(tmp_path, change=wrong("attend_vector")) as launches:
        with pytest.warns(RuntimeWarning, match="doctor --all --json"):
            assert attend().right
        assert launches.kernels["attend_vector"] == 2  # the proof alone, twice
        assert "[paged_attention]" in caplog.text
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert attend().right  # told once, not proven again in this process
        assert launches.kernels["attend_vector"] == 2
    assert list(tmp_path.glob("*")) == []
    with gpu(tmp_path) as launches:  # the next process asks again
        assert attend().right
        assert launches.kernels["attend_vector"] == 2


def test_a_kernel_that_is_wrong_once_is_proven_a_second_time_and_trusted(tmp_path):
    broken = wrong("attend_vector")
    changes = iter([broken])
    with gpu(tmp_path, change=lambda d: next(changes, lambda d: d)(d)) as launches:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert attend().right
        assert launches.kernels["attend_vector"] == 3  # two proofs, the call
    assert list(remembered(tmp_path).values()) == [True]


def test_a_bad_verdict_of_an_older_version_is_not_believed(tmp_path):
    with gpu(tmp_path):
        attend()
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps(dict.fromkeys(remembered(tmp_path), False)))
    with gpu(tmp_path) as launches:
        assert attend().right and launches.kernels["attend_vector"] == 2
    assert list(remembered(tmp_path).values()) == [True]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows, merged", [(1, False), (4, False), (8, True), (32, False)])
def test_a_proof_looks_for_wrong_pages_and_not_for_ulps(tmp_path, monkeypatch, dtype, rows, merged):
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda *a, **k: run(*a, **k | {"ulp": 16}))
    variant = Variant("paged_attention", dtype, 64, 64, rows=rows, merged=merged)

    def previous_page(dispatch):
        text = re.sub(
            r"(?<=[^a-z_])pages\[(page|p|index)\]", r"pages[\1 > 0 ? \1 - 1 : 0]", dispatch["text"]
        )
        return dispatch | {"text": text}

    with metal_on_host(instrument=False) as launches:
        assert first_use.prove(variant, mx.cpu)
    assert any(kernel.startswith("attend") for kernel in launches.kernels)
    with metal_on_host(instrument=False, change=previous_page):
        assert not first_use.prove(variant, mx.cpu)


def test_without_the_guard_the_planted_fault_is_a_wrong_answer(tmp_path):
    with gpu(tmp_path, change=wrong("attend_vector")), first_use.unchecked():
        assert not attend().right


def test_a_kernel_that_does_not_compile_is_replaced(tmp_path):
    def broken(dispatch):
        return dispatch | {"text": dispatch["text"] + "\nthis is no kernel\n"}

    with gpu(tmp_path, change=broken), pytest.warns(RuntimeWarning):
        assert attend().right


def test_a_proof_that_raised_is_a_bad_verdict():
    assert first_use.prove(Variant("copy_pages", "float16", 64, 64), "no stream") is False


def test_another_option_is_another_variant(tmp_path):
    with gpu(tmp_path):
        assert attend().right
        assert attend(CASE.replace(softcap=5.0)).right
        assert attend(CASE.replace(sliding_window=7, sinks=1.0)).right
    assert len(remembered(tmp_path)) == 3


def test_a_pool_on_a_gpu_with_a_wrong_write_stays_right(tmp_path):
    k = mx.array(np.random.default_rng(0).standard_normal((3, 2, 16)).astype(np.float32))
    with gpu(tmp_path, change=wrong("write_pages")):
        pool = PagePool(1, 4, 8, 2, 16, mx.float32)
        with pytest.warns(RuntimeWarning, match="write_pages"):
            pool.write(0, k, k, [9, 2, 31])
        mx.eval(pool.state)
        pool.check()
    written = np.array(pool[0].arrays[0])
    assert all(
        (written[s // 8, :, s % 8] == np.array(k[i])).all() for i, s in enumerate([9, 2, 31])
    )
    assert (written != 0).sum() == k.size


def test_a_pool_whose_kinds_of_calls_are_known_asks_the_guard_nothing(tmp_path, monkeypatch):
    q, k = mx.zeros((1, 4, 16)), mx.zeros((1, 2, 16))
    masks = mx.ones((1, 1), mx.bool_), mx.zeros((1, 1))
    with gpu(tmp_path):
        pool = PagePool(1, 4, 8, 2, 16, mx.float32)
        plan = fast.plan([[0]], [1], num_q_heads=4, num_kv_heads=2, page_size=8, head_dim=16)

        def step(**options):
            pool.write(0, k, k, [0])
            return pool[0].attend(q, plan, **options)

        def asked(*arguments):
            raise RuntimeError("asked")

        mx.eval(step(), step(mask=masks[0]))
        monkeypatch.setattr(Guard, "stream", asked)
        monkeypatch.setattr(AttentionOptions, "kinds", property(asked))
        mx.eval(step(), step(mask=masks[0]))
        for other in ({"softcap": 1.0}, {"sinks": mx.zeros(4)}, {"mask": masks[1]}):
            with pytest.raises(RuntimeError, match="asked"):
                step(**other)


def test_moving_and_merging_are_proven_too(tmp_path):
    with gpu(tmp_path):
        pages = mx.zeros((4, 2, 8, 16), mx.bfloat16)
        fast.copy_pages([pages, pages], [(0, 1)])
        fast.gather_pages(pages, pages, [[0, 1]], [9])
        fast.merge_states([mx.zeros((2, 2, 16))] * 2, [mx.zeros((2, 2))] * 2)
    proven = remembered(tmp_path)
    assert all(proven.values()) and len(proven) == 3


def test_bad_arguments_get_their_own_error_and_no_proof(tmp_path):
    with gpu(tmp_path) as launches:
        with pytest.raises(ValueError, match="must have shape"):
            pages = mx.zeros((4, 2, 8, 16))
            fast.write_pages(mx.zeros((1, 2)), mx.zeros((1, 2)), pages, pages, [0])
        assert not launches.kernels


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 3}', "{"])
def test_a_file_of_verdicts_that_is_damaged_is_no_verdict(tmp_path, content):
    with gpu(tmp_path):
        attend()
    (path,) = tmp_path.glob("*.json")
    path.write_text(content)
    with gpu(tmp_path) as launches:
        assert attend().right and launches.kernels["attend_vector"] == 2


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 12, 40])
def test_a_proof_runs_the_body_that_the_call_runs(dtype, head_dim, rows):
    body = _ext.attention_body(rows, head_dim, head_dim, dtype)
    name = str(dtype).removeprefix("mlx.core.")
    case = first_use.proof_case(Variant("paged_attention", name, head_dim, head_dim, rows=body[1]))
    proven = max(query_len for query_len, _ in case.sequences) * case.gqa_factor
    assert _ext.attention_body(proven, head_dim, head_dim, dtype) == body


@pytest.mark.parametrize("formats", [PageFormats(), PageFormats("q4", "q4")])
def test_a_plan_known_only_as_an_array_may_run_any_body_of_its_group_size(formats):
    q, width = mx.zeros((1, 4, 64), mx.float16), 64 if formats.are_dense else 8  # words of codes
    pages = mx.zeros((4, 2, 64, width), mx.float16 if formats.are_dense else mx.uint32)
    found = operations.attention_variants(q, pages, pages, None, OptionKinds(), formats)
    assert {v.rows for v in found} == {
        _ext.attention_body(n, 64, 64, mx.float16, formats)[1] for n in range(2, 400)
    }
    assert (32 in {v.rows for v in found}) == formats.are_dense  # q4 has no registers for them
    assert {v.merged for v in found} == {v.window for v in found} == {True, False}
