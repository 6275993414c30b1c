"""PyTorch's scaled_dot_product_attention on contiguous K and V, where it is installed."""

import mlx.core as mx
import numpy as np
from paged_mlx.machine.bench.workload import Workload

from benchmarks.harness import Candidate

try:
    import torch
except ImportError:
    torch = None
    print("torch is not installed: its rows are left out")

NAME = "torch SDPA, contiguous"


def torch_sdpa(work: Workload, threads: int = 1) -> list[Candidate]:
    """The candidate, or none where torch is not installed or contexts differ in length."""
    if torch is None or len(set(work.lengths)) > 1:
        return []
    torch.set_num_threads(threads)
    layers = [[tensor(x) for x in work.contiguous_kv(i)] for i in range(work.pool.num_layers)]
    batch, length, context = len(work.lengths), work.query_lens[0], work.lengths[0]
    q = tensor(work.q).reshape(batch, length, work.g.num_q_heads, work.g.head_dim).transpose(1, 2)
    options = {"enable_gqa": work.g.num_q_heads != work.g.num_kv_heads}
    if length == context:
        options["is_causal"] = True
    elif length > 1:
        visible = torch.ones(length, context, dtype=torch.bool)
        options["attn_mask"] = visible.tril(context - length)

    def attend(layer):
        with torch.inference_mode():
            out = torch.nn.functional.scaled_dot_product_attention(q, *layers[layer], **options)
        return out.transpose(1, 2).flatten(0, 1)

    return [Candidate(NAME, work.in_turn(attend), work.nbytes)]


def tensor(array: mx.array):
    """The array as torch's, a copy."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
