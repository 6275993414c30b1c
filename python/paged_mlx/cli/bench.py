"""``paged-mlx bench``: the kernels, or a model, on pages beside what there is without."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paged_mlx.cli.options import (
    Mistake,
    count,
    counts,
    kv_formats,
    needs_mlx_lm,
    parser,
    whole_numbers,
)
from paged_mlx.cli.progress import Progress
from paged_mlx.machine.cache import check_writable, write_whole

RETAIN = 32  # enable's default
DESCRIPTION = """\
Tests as llama-bench names them: pp512 processes a prompt of 512 tokens, tg128 generates 128,
"@ d4096" with 4096 tokens in the cache before, "x8" for 8 sequences at once. All ways to do a
test take turns in one run, their outputs are compared first, and a table says mean and standard
deviation, and at last which kernels served.

Without --model: attention of one layer, for which tg is one decode step. With it: a model of
mlx-lm on pages beside mlx-lm's own caches.

With --html: a report for a browser, one file, with curves; without tests of your own it measures
what curves need, in a few minutes."""
EXAMPLES = """
paged-mlx bench                                   # the kernels: 128 tokens on 1024, 1 and 8 decodes
paged-mlx bench -p 512 -d 0,4096 -b 1,16 --shared 2048 --ragged
paged-mlx bench --model mlx-community/Qwen3-0.6B-4bit -p 512 -n 128 -d 0,4096
paged-mlx bench --html report.html                # curves: context, batch, prefix, page size
paged-mlx bench --model ./my-model -p 0 -n 32 -d 1024 -b 8 -o json > bench.json
"""


def main(arguments: list[str]) -> int:
    chosen = _options().parse_args(arguments)
    wanted = _wanted(chosen)
    if not wanted:
        raise Mistake("there is nothing to run: -p and -n are both 0")
    if chosen.html:
        _check_html(chosen.html)
    with Progress() as progress:
        about, results, routes = _measured(chosen, wanted, progress)
    _print(chosen, about, results, routes)
    return 0


def _wanted(chosen) -> list:
    """The trials."""
    from paged_mlx.machine.bench.trials import sweep, trials

    tests = ("n_prompt", "n_gen", "n_depth", "batch", "shared", "page_size")
    if (
        chosen.html
        and chosen.model is None
        and all(getattr(chosen, name) is None for name in tests)
    ):
        return list(dict.fromkeys(sweep(128, 1, (8, 16, 32, 64, 128, 256))))
    page_sizes = chosen.page_size or [16]
    if chosen.model is not None and len(page_sizes) > 1:
        raise Mistake("--page-size must be one number with --model")
    prompts, generated = chosen.n_prompt or [128], chosen.n_gen or [32]
    if chosen.model is None:
        generated = [int(any(generated))]
    prompts, generated = ([n for n in counts if n] for counts in (prompts, generated))
    depths, batches = chosen.n_depth or [1024], chosen.batch or [1, 8]
    return list(
        trials(prompts, generated, depths, batches, chosen.shared or (), chosen.ragged, page_sizes)
    )


def _check_html(path: Path) -> None:
    """Refuse, before anything is measured, a report that could not be written.

    Raises:
        Mistake: It could not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise Mistake("--html needs matplotlib: pip install matplotlib")
    try:
        check_writable(path)
    except OSError as error:
        raise Mistake(f"--html {path}: {error.strerror}") from error


def _options() -> argparse.ArgumentParser:
    options = parser("bench", DESCRIPTION, EXAMPLES)
    tests = options.add_argument_group("tests")
    tests.add_argument(
        "-m", "--model", help="a folder with a model of mlx-lm, or a name on Hugging Face"
    )
    tests.add_argument(
        "-p",
        "--n-prompt",
        type=whole_numbers,
        metavar="N,N",
        help="prompts (128); 0: none",
    )
    tests.add_argument(
        "-n", "--n-gen", type=whole_numbers, metavar="N,N",
        help="tokens to generate (32); 0: none; without a model always one decode step",
    )  # fmt: skip
    tests.add_argument(
        "-d", "--n-depth", type=whole_numbers, metavar="N,N",
        help="tokens in the cache before (1024)",
    )  # fmt: skip
    tests.add_argument(
        "-b", "--batch", type=counts, metavar="N,N",
        help="sequences that generate at once (1,8)",
    )  # fmt: skip
    tests.add_argument(
        "--shared",
        type=counts,
        metavar="N,N",
        help="also batches that begin with N common tokens",
    )
    tests.add_argument("--ragged", action="store_true", help="also batches of unequal lengths")
    tests.add_argument(
        "--kv-format", type=kv_formats, default=[], metavar="F,F",
        help="also pages of these formats, as q8,q8/q4,q4: one for K and V, or one each",
    )  # fmt: skip
    tests.add_argument(
        "-r", "--repetitions", type=count, default=5, metavar="N", help="runs of each test (5)"
    )
    options.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "csv"),
        default="md",
        help="form of the result (md)",
    )
    options.add_argument(
        "--json", dest="output", action="store_const", const="json", help="the same as -o json"
    )
    options.add_argument(
        "--html", type=Path, metavar="FILE",
        help="also a report with curves, one file for a browser; needs matplotlib",
    )  # fmt: skip
    options.add_argument(
        "--page-size", type=counts, metavar="N,N", help="tokens in a page (16); several are tried each"
    )  # fmt: skip
    shape = options.add_argument_group("the layer, without --model")
    shape.add_argument("--num-q-heads", type=count, default=32, help="(32)")
    shape.add_argument("--num-kv-heads", type=count, default=8, help="(8)")
    shape.add_argument("--head-dim", type=count, default=128, help="(128)")
    shape.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="(float16)"
    )
    return options


def _measured(chosen, wanted: list, progress: Progress) -> tuple[dict, list[dict], dict]:
    """What was measured, the results, and which kernels served."""
    from paged_mlx.machine.bench.measure import environment, measure
    from paged_mlx.machine.routes import kernel_routes, since

    about: dict[str, Any] = environment()
    cases, attention = (_of_kernels if chosen.model is None else _of_model)(
        chosen, wanted, about, progress
    )
    before = kernel_routes()
    results: list[dict] = []
    for case in cases:

        def told(line: str) -> None:
            progress(f"{len(results) + 1} of {len(wanted)}: {line}")

        try:
            results.append(measure(case, told))
        except AssertionError as error:
            raise RuntimeError(f"{case.name} was not timed: {error}") from error
    return about, results, {"kernels": since(before), **attention()}


def _of_kernels(chosen, wanted: list, about: dict, progress: Progress) -> tuple[Iterator, Any]:
    from paged_mlx.formats.page_format import PageFormats
    from paged_mlx.machine.bench.bandwidth import read_bandwidth
    from paged_mlx.machine.bench.kernels import cases
    from paged_mlx.machine.bench.workload import Geometry

    if chosen.num_q_heads % chosen.num_kv_heads:
        raise Mistake(
            f"--num-q-heads must be a multiple of --num-kv-heads, {chosen.num_kv_heads}; got {chosen.num_q_heads}"
        )
    names = ("num_q_heads", "num_kv_heads", "head_dim", "dtype")
    sizes = {name: getattr(chosen, name) for name in names}
    about |= {"measured": "kernels", "geometry": sizes}
    progress("reading memory")
    about["read_bandwidth"] = read_bandwidth()
    formats = [PageFormats(*pair) for pair in chosen.kv_format]
    for each in formats:
        each.check(
            "bench",
            chosen.head_dim,
            chosen.head_dim,
            max(64, *(trial.page_size for trial in wanted)),
        )
    return cases(iter(wanted), Geometry(**sizes), chosen.repetitions, formats), dict


def _of_model(chosen, wanted: list, about: dict, progress: Progress) -> tuple[Iterator, Any]:
    needs_mlx_lm()
    import mlx_lm

    from paged_mlx.cli.pages import loaded
    from paged_mlx.machine.bench.models import PAGED, STOCK, ModelBench
    from paged_mlx.mlx_lm.enable import PagedModel, enable

    progress(f"loading {chosen.model}")
    model, tokenizer = loaded(mlx_lm.load, chosen.model)[:2]
    page_size = wanted[0].page_size
    paged = enable(model, page_size=page_size)
    ways = {PAGED: paged.make_cache, STOCK: paged.stock_cache}
    models = [paged]
    for pair in chosen.kv_format:  # beside the model that is enabled, whose hook serves all
        held = PagedModel(model, None, None, RETAIN, kv_format=pair)
        held.meet()
        models.append(held)
        ways[f"{PAGED}, {held.formats}"] = held.make_cache

    def attention() -> dict[str, Any]:
        found: Counter[str] = Counter()
        for each in models:
            found.update(each.routes)
        return {"attention": dict(found)}

    about |= {"measured": "model", "model": Path(chosen.model).name, "page_size": page_size}
    bench = ModelBench(model, len(tokenizer.get_vocab()), ways)
    return bench.cases(iter(wanted), chosen.repetitions), attention


def _print(chosen, about: dict, results: list[dict], routes: dict) -> None:
    from paged_mlx.machine.bench.results import record, to_csv, to_json, to_markdown
    from paged_mlx.machine.routes import in_words

    found = record(about, results, routes)
    if chosen.html:
        from paged_mlx.machine.bench.report import to_html

        write_whole(chosen.html, to_html(found))
        print(f"report: {chosen.html}", file=sys.stderr)
    print({"md": to_markdown, "json": to_json, "csv": to_csv}[chosen.output](found))
    if chosen.output != "md":
        return
    machine, versions = about["machine"], about["versions"]
    print(
        f"\n{machine['processor']}, {machine['cores']} cores, {machine['system']}, mlx {versions['mlx']}, {about['date']}"
    )
    if not any("gpu" in places for places in routes["kernels"].values()):
        print("MLX's own attention is slow on the CPU: these ratios are not those of a GPU.")
    print("\nWhich kernels served:")
    for route, calls in routes.get("attention", {}).items():
        print(f"{route}: {calls} attention calls")
    print(in_words(routes["kernels"]))
    sys.stdout.flush()
