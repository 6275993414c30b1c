"""Prints docs/mlx_lm_models.md: what every model of the installed mlx-lm does on pages."""

import importlib.metadata
import pathlib
import re
import sys

import mlx.core as mx
import mlx_lm_compare as compare
import mlx_lm_zoo as zoo

COMMAND = "PYTHONPATH=tests/support python tests/support/mlx_lm_table.py > docs/mlx_lm_models.md"
PATH = pathlib.Path(__file__).parents[2] / "docs/mlx_lm_models.md"

INTRODUCTION = """\
# Models of mlx-lm on pages

Every model class of {versions}, tiny and with random weights: greedy tokens and
their log-probabilities on pages, compared with mlx-lm's own caches. Made by
`{command}`.

- *single*: a prompt in chunks, longer than the sliding window.
- *batched*: ragged prompts, a late join, early leaves, chunked prefill.
- *speculative*: with a draft that is mostly wrong and with itself, compared with plain greedy
  decoding.
- *paged*: reads of K and V that read pages in single generation; the others gather K and V.

"stock refuses": mlx-lm cannot do it on its own caches, for the reason in the note, and the
same error comes with pages.
"""


def committed() -> dict[str, list[str]]:
    """The rows of the committed table: model -> cells."""
    rows = re.findall(r"^\| (\S+) \| (.*) \|$", PATH.read_text(), re.MULTILINE)
    return {model: cells.split(" | ") for model, cells in rows if model != "model"}


def made_with() -> str:
    """The mlx-lm whose models the committed table has."""
    return re.search(r"mlx-lm (\d[\w.]*)", PATH.read_text()).group(1)


def is_of_this_mlx_lm() -> bool:
    return made_with() == importlib.metadata.version("mlx-lm")


def row(family: str) -> str:
    if family in zoo.NO_KV:
        cells = ["-"] * 4 + [f"no K and V to page: {zoo.NO_KV[family]}"]
    else:
        report = compare.report(family, thorough=True)
        cells = [*report.cells, "; ".join([*report.reasons, *report.notes])]
    return f"| {family} | {' | '.join(cells)} |"


def main() -> None:
    # On a CPU it runs a C++ compiler for each new function.
    mx.disable_compile()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx")]
    print(INTRODUCTION.format(versions=" with ".join(versions), command=COMMAND))
    print("| model | single | batched | speculative | paged | why not, and where stock differs |")
    print("|---|---|---|---|---|---|")
    for family in zoo.installed():
        print(f"working on {family}", file=sys.stderr)
        print(row(family), flush=True)


if __name__ == "__main__":
    main()
