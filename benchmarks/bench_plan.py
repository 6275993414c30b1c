"""What does planning a step cost?

Tables and lengths in, a plan out; by CPU time, one thread does everything.
"""

import numpy as np
from paged_mlx import fast

from benchmarks.harness import Candidate, Case, run

PAGE_SIZE, NUM_Q_HEADS, NUM_KV_HEADS, REPEATS = 16, 32, 8, 10
BATCHES = {
    "1000 x 4096": (1000, 4096, 0),
    "32 x 4096": (32, 4096, 0),
    "32 x 4096, 2048 of them shared": (32, 4096, 2048),
    "1 x 32768": (1, 32768, 0),
}


def tables_of(batch, length, shared):
    pages, common = length // PAGE_SIZE, shared // PAGE_SIZE
    ids = np.random.default_rng(0).permutation(common + batch * (pages - common)).astype(np.int32)
    tables = np.empty((batch, pages), np.int32)
    tables[:, :common] = ids[:common]
    tables[:, common:] = ids[common:].reshape(batch, pages - common)
    return tables


def case(name, batch, length, shared, rounds=30) -> Case:
    tables = tables_of(batch, length, shared)
    before = np.full(batch, length - 1, np.int32)
    lens = np.full(batch, length, np.int32)
    heads = {"num_q_heads": NUM_Q_HEADS, "num_kv_heads": NUM_KV_HEADS, "page_size": PAGE_SIZE}
    previous = fast.plan(tables, before, **heads)

    def repeat(work):
        def run():
            for _ in range(REPEATS):
                plan = work()
            return plan

        return run

    candidates = [
        Candidate("plan", repeat(lambda: fast.plan(tables, lens, **heads))),
        Candidate("advance", repeat(lambda: previous.advance(tables, lens))),
    ]
    return Case(name, candidates, same, rounds, 2, "cpu", {"unit": "step", "units": REPEATS})


def same(outputs: dict) -> None:
    plans = list(outputs.values())
    assert all(plan.items == plans[0].items for plan in plans), "the plans differ"


def main():
    record = run("plan", (case(name, *batch) for name, batch in BATCHES.items()))
    for result in record["cases"]:
        for candidate in result["candidates"]:
            each = candidate["median"] / result["about"]["units"]
            print(f"{result['name']:<34} {candidate['name']:<8} {each * 1e6:9.1f} us per step")


if __name__ == "__main__":
    main()
