"""OpenVINO's PagedAttention on the CPU, a model of this one operation.

It always writes the K and V of the new tokens too, and its queries and outputs are float32.
Its cache has the dtype of the case, and blocks of the only size that it takes; its own
operation has written them.
"""

from functools import cached_property

import numpy as np
from paged_mlx.machine.bench.workload import Workload, floats, shuffled_tables

from benchmarks.harness import Candidate, LeftOut

try:
    import openvino as ov
    from openvino import opset13
    from openvino.op import _PagedAttentionExtension
except ImportError:
    ov = None

NAME = "OpenVINO"
PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
CACHES = ("key_cache.0", "value_cache.0")
BLOCKS_AT_ONCE = 32  # written by one call


def openvino(work: Workload, threads: int = 1) -> list[Candidate]:
    """The candidate.

    Raises:
        LeftOut: OpenVINO is not installed, or does not take the dtype on this machine.
    """
    if ov is None:
        raise LeftOut("openvino is not installed")
    model = _Model(work, threads)
    tables = shuffled_tables(work.lengths, model.block_size, np.random.default_rng(1))
    requests = [model.step(layer, tables) for layer in work.layers]

    def attend(layer):
        requests[layer].infer(share_outputs=True)
        return requests[layer].get_output_tensor().data.reshape(work.q.shape)

    return [Candidate(NAME, work.in_turn(attend), work.nbytes)]


class _Model:
    """The operation compiled for the heads and the dtype of a workload."""

    def __init__(self, work: Workload, threads: int):
        self.work = work
        precision = PRECISIONS[work.g.dtype]
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
        }
        try:
            self.compiled = ov.Core().compile_model(_graph(work.g), "CPU", options)
        except RuntimeError as error:
            reason = [line for line in str(error).splitlines() if line.strip()][-1]
            raise LeftOut(f"no {work.g.dtype} cache on this machine: {reason}") from None

    @cached_property
    def cache_shape(self):
        """``[blocks, num_kv_heads, block_size, head_dim]``, the number of blocks open."""
        return self.compiled.input(CACHES[0]).get_partial_shape()

    @property
    def block_size(self) -> int:
        return self.cache_shape[2].get_length()

    def step(self, layer: int, tables):
        """A request that attends with the workload's queries against a layer's cache."""
        work = self.work
        k, v = (_rows(x) for x in work.packed_kv(layer))
        caches = self._caches(k, v, tables)
        ends = np.cumsum(work.lengths)
        new = np.concatenate([np.arange(e - n, e) for e, n in zip(ends, work.query_lens)])
        return self._request(
            caches,
            q=_rows(work.q),
            k=k[new],
            v=v[new],
            past_lens=np.subtract(work.lengths, work.query_lens),
            query_lens=work.query_lens,
            blocks=[row[: -(-n // self.block_size)] for row, n in zip(tables, work.lengths)],
        )

    def _caches(self, k, v, tables):
        """K and V in blocks: each block is written as if it were a sequence of its own."""
        work, size = self.work, self.block_size
        blocks = []  # (id, first row, last row)
        start = 0
        for row, length in zip(tables, work.lengths):
            for block_id, at in zip(row, range(0, length, size)):
                blocks.append((block_id, start + at, start + min(at + size, length)))
            start += length
        shape = [len(blocks), *(self.cache_shape[i].get_length() for i in (1, 2, 3))]
        caches = [ov.Tensor(self.compiled.input(n).element_type, shape) for n in CACHES]
        for at in range(0, len(blocks), BLOCKS_AT_ONCE):
            some = blocks[at : at + BLOCKS_AT_ONCE]
            rows = np.concatenate([np.arange(begin, end) for _, begin, end in some])
            self._request(
                caches,
                q=np.zeros((len(rows), work.g.num_q_heads * work.g.head_dim), np.float32),
                k=k[rows],
                v=v[rows],
                past_lens=np.zeros(len(some)),
                query_lens=[end - begin for _, begin, end in some],
                blocks=[[block_id] for block_id, _, _ in some],
            ).infer()
        return caches

    def _request(self, caches, q, k, v, past_lens, query_lens, blocks):
        request = self.compiled.create_infer_request()
        for name, cache in zip(CACHES, caches):
            request.set_tensor(name, cache)
        for name, rows in {"q": q, "k": k, "v": v}.items():
            request.set_tensor(name, ov.Tensor(rows))
        words = {
            "past_lens": past_lens,
            "subsequence_begins": np.concatenate([[0], np.cumsum(query_lens)]),
            "block_indices": np.concatenate(blocks),
            "block_indices_begins": np.cumsum([0, *map(len, blocks)]),
            "max_context_len": np.max(np.add(past_lens, query_lens)),
        }
        for name, values in words.items():
            request.set_tensor(name, ov.Tensor(np.array(values, np.int32)))
        return request


def _rows(array) -> np.ndarray:
    """``[tokens, heads * head_dim]``, float32."""
    return floats(array).reshape(len(array), -1)


def _graph(g):
    """The operation with its 28 inputs; those of other features are empty."""
    inputs = []

    def parameter(name, kind, shape):
        node = opset13.parameter(ov.PartialShape(shape), kind)
        node.output(0).get_tensor().set_names({name})
        inputs.append(node)
        return node

    def words(name):
        return parameter(name, ov.Type.i32, [-1])

    def constant(value, dtype=np.int32):
        return opset13.constant(np.array(value, dtype))

    def none(dtype=np.int32, dims=1):
        return opset13.constant(np.zeros((0,) * dims, dtype))

    node = _PagedAttentionExtension(
        [
            source.output(0)
            for source in (
                parameter("q", ov.Type.f32, [-1, g.num_q_heads * g.head_dim]),
                parameter("k", ov.Type.f32, [-1, g.num_kv_heads * g.head_dim]),
                parameter("v", ov.Type.f32, [-1, g.num_kv_heads * g.head_dim]),
                *(parameter(name, ov.Type.dynamic, [-1] * 4) for name in CACHES),
                words("past_lens"),
                words("subsequence_begins"),
                words("block_indices"),
                words("block_indices_begins"),
                constant(g.head_dim**-0.5, np.float32),  # scale
                constant(0),  # sliding window
                none(np.float32),  # ALiBi slopes
                parameter("max_context_len", ov.Type.i32, []),
                none(),  # score aggregation window
                none(),  # rotated blocks
                none(),  # rotation deltas
                none(np.float32),  # rotation table
                none(np.float32),  # XAttention threshold
                constant(0),  # XAttention block size
                constant(0),  # XAttention stride
                none(np.float32, dims=4),  # sinks
                constant(0),  # adaptive R-KV: start
                none(),  # adaptive R-KV: evictable sizes
                none(),  # adaptive R-KV: blocks of the diversity set
                none(),  # adaptive R-KV: where they begin
                none(),  # token types
                none(np.uint8),  # query-query bias
                none(),  # where it begins
            )
        ]
    )
    about = node.get_rt_info()
    about["num_k_heads"] = about["num_v_heads"] = g.num_kv_heads
    about["k_head_size"] = about["v_head_size"] = g.head_dim
    return ov.Model([opset13.result(node.output(0))], inputs, "paged_attention")
