"""The notebook runs from top to bottom, without Jupyter, and shows its maps."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "paging.ipynb"
MAPS = [
    "",
    "AABAB",
    "22B2B",  # a fork shares all pages of a
    "22BABC",  # and has copied the last
    "AABA",
    "AABACC",  # of eight pages a window keeps two
    "ccc.cc",
    "2B2A22B",
    "AAcAccAAAAAAAAAAAAAAAAAA",
]


@pytest.fixture(scope="module")
def cells():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(source: str, names: dict):
    """The value of a cell's last expression, as a notebook shows it; None without one."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
    return last and eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def test_the_notebook_runs_and_shows_its_maps(cells, capsys):
    names, maps = {}, []
    for cell in cells:
        shown = run("".join(cell["source"]), names)
        if hasattr(shown, "_repr_html_"):
            assert shown.summary() in shown._repr_html_()
            maps.append(shown.text().splitlines()[0])
    assert [row.rstrip(".") for row in maps] == MAPS
    assert "copied, as (from, to): [(3, 5)]" in capsys.readouterr().out


def test_the_notebook_is_kept_without_outputs(cells):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
