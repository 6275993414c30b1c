"""Prints docs/mlx_lm_models.md: what each family of the zoo does on pages.

PYTHONPATH=tests python tests/mlx_lm_table.py > docs/mlx_lm_models.md
"""

import importlib.metadata
import sys

import mlx_lm_zoo as zoo

from paged_mlx.mlx_lm import enable, explain

PROMPTS = [zoo.prompt(length, seed=length) for length in (5, 33, 17)]


def outcome(run, model) -> tuple:
    """What ``run`` gives, or that it is refused."""
    try:
        return "tokens", run(model)
    except (ValueError, AttributeError, TypeError) as error:
        return "refused", type(error).__name__


def compare(stock, paged) -> str:
    if stock[0] == "refused":
        return "stock refuses"
    return "equal" if stock == paged else "**differs**"


RUNS = {
    "single": lambda model: zoo.single(model, zoo.prompt(45, seed=1), max_tokens=10),
    "batched": lambda model: zoo.batched(model, PROMPTS, [8, 3, 6], late={2: 2}),
    # Stock is wrong past a window: the yardstick is plain greedy decoding.
    "speculative": lambda model: zoo.speculative(
        model, model, zoo.prompt(45, seed=1), max_tokens=10
    ),
}


def row(family: str) -> str:
    model = zoo.tiny(family)
    stock = {name: outcome(run, model) for name, run in RUNS.items()}
    if stock["speculative"][0] == "tokens":
        stock["speculative"] = stock["single"]
    with enable(model, page_size=8) as paged:
        cells = [compare(stock[name], outcome(run, model)) for name, run in RUNS.items()]
        paged.check()
    found = explain(model)
    reasons = sorted({layer.reason for layer in found.layers if layer.reason})
    layers = f"{found.num_paged} of {len(found.layers)}"
    return f"| {family} | {' | '.join(cells)} | {layers} | {'; '.join(reasons)} |"


def main() -> None:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx")]
    print("# Models of mlx-lm on pages\n")
    print(f"Tiny random models, greedy tokens compared with {', '.join(versions)}; made by")
    print("`tests/mlx_lm_table.py`. Batched: ragged prompts, a late join, early leaves, chunked")
    print("prefill. Speculative: compared with plain greedy decoding.\n")
    print("| model | single | batched | speculative | layers paged | why others are not |")
    print("|---|---|---|---|---|---|")
    for family in [*zoo.FAMILIES, *zoo.MORE]:
        print(f"working on {family}", file=sys.stderr)
        print(row(family), flush=True)


if __name__ == "__main__":
    main()
