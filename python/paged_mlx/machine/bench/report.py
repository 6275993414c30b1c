"""A run as one HTML file that needs nothing else: curves, the table, the machine, and the record itself."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from paged_mlx.machine.bench.curves import curves, svg
from paged_mlx.machine.bench.results import rows
from paged_mlx.machine.routes import in_words

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1120px; padding: 0 1em; color: #212529; background: white; }}
  h1 {{ font-size: 1.5em; }}
  h2 {{ font-size: 1.15em; margin-top: 1.8em; }}
  .curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1em; align-items: start; }}
  figure {{ margin: 0; }}
  .curves svg {{ width: 100%; height: auto; }}
  table {{ border-collapse: collapse; font-size: .9em; }}
  th, td {{ padding: .25em .8em; border-bottom: 1px solid #dee2e6; text-align: right; }}
  th:first-child, td:first-child {{ text-align: left; }}
  .note {{ color: #495057; }}
</style>
<h1>{title}</h1>
<p class="note">{about}</p>
<ul>{verdict}</ul>
<h2>Curves</h2>
<div class="curves">
{curves}
</div>
<h2>All tests</h2>
<table>
{table}
</table>
<h2>Which kernels served</h2>
<pre>{routes}</pre>
<h2>How it was measured</h2>
<p class="note">{how}</p>
<p class="note">The record, with every sample, is in this file: <code>JSON.parse(document.getElementById("record").textContent)</code>.</p>
<script type="application/json" id="record">{record}</script>
</html>
"""
HOW = """\
Outputs were compared before anything was timed. Then the ways took turns in one process, A B B A, so that ratios hold on a machine that others use
too. Curves join medians; the table has means and standard deviations. Decode of the kernels is one step of one layer, planned anew; graph and evaluation are inside the time."""
BANDWIDTH = """\
 The share of the bandwidth is K and V that a step must read, a common prefix once, over its time, and that over {:.1f} GB/s, which this
machine read in the same run doing nothing else. What fits a cache can exceed 100%."""
CPU = " MLX's own attention is slow on the CPU: these ratios are not those of a GPU."


def to_html(found: dict[str, Any]) -> str:
    """A record of ``paged-mlx bench`` as a page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    of_kernels = found["measured"] == "kernels"
    machine, versions = found["machine"], found["versions"]
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    about = f"{machine['processor']}, {machine['cores']} cores, {machine['system']} {machine['arch']}; {used}; {found['date']}"
    if of_kernels:
        layer = ", ".join(f"{name} {value}" for name, value in found["geometry"].items())
        about += f"; one layer, {layer}"
    on_gpu = any("gpu" in places for places in found["routes"]["kernels"].values())
    drawn = list(curves(found))
    verdicts: dict[str, list[str]] = {}
    for one in drawn:
        for sentence in one.verdicts():
            verdicts.setdefault(sentence, []).append(one.title)
    bandwidth = found.get("read_bandwidth")
    head, *body = rows(found)
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body]
    routes = [
        f"{route}: {n} attention calls" for route, n in found["routes"].get("attention", {}).items()
    ]
    return PAGE.format(
        title="paged_mlx: " + ("attention of one layer" if of_kernels else escape(found["model"])),
        about=escape(about),
        verdict="".join(
            f"<li>{escape(f'{said}: {_of(titles, len(drawn))}')}</li>"
            for said, titles in verdicts.items()
        ),
        curves="\n".join(f"<figure>{svg(c)}</figure>" for c in drawn),
        table="\n".join(lines),
        routes=escape("\n".join([*routes, in_words(found["routes"]["kernels"])])),
        how=escape(
            HOW + (BANDWIDTH.format(bandwidth / 1e9) if bandwidth else "") + ("" if on_gpu else CPU)
        ),
        record=json.dumps(found).replace("</", "<\\/"),
    )


def _of(titles: list[str], all_curves: int) -> str:
    return "all curves" if len(titles) == all_curves else "; ".join(dict.fromkeys(titles))
