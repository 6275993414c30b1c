"""Pictures of a pool: each page is drawn as what it is."""

import json
import xml.etree.ElementTree as ET

import pytest
from paged_mlx import PagePool, PageTable, PrefixCache
from paged_mlx.pages.pool_map import CACHED, COLOURS, FREE, SHARED, PoolMap, page_figures


@pytest.fixture
def pool():
    return PagePool(1, 12, 4, 2, 64)


def grown(pool, num_tokens):
    table = PageTable(pool.page_size)
    table.append_tokens(num_tokens, pool.allocator)
    return table


def test_the_map_tells_who_holds_a_page(pool):
    a = grown(pool, 6)
    b = a.fork()
    b.append_tokens(4, pool.allocator)  # a copy of the tail page, and a new one
    other = grown(pool, 3)
    found = pool.map([a, b])
    signs = {page.page_id: page.sign for page in found.pages}
    assert signs[a.page_ids[0]] == "2" and found.pages[a.page_ids[0]].colour == SHARED
    assert signs[a.page_ids[1]] == "A" and found.pages[a.page_ids[1]].colour == COLOURS[0]
    assert [signs[page_id] for page_id in b.page_ids[1:]] == ["B", "B"]
    assert signs[other.page_ids[0]] == "#"  # held by a table that was not named
    assert sum(page.colour == FREE for page in found.pages) == pool.allocator.num_free == 7
    assert "held by sequence 0, sequence 1" in found.tells(found.pages[a.page_ids[0]])
    assert found.summary() == "12 pages of 4 tokens: 5 in use (1 shared, 0 cached alone), 7 free"


def test_a_page_that_only_a_cache_holds_is_another(pool):
    table = grown(pool, 8)
    cache = PrefixCache(pool.allocator)
    cache.insert(range(8), table)
    assert [pool.map([table], [cache]).pages[page_id].sign for page_id in table.page_ids] == [
        "A",
        "A",
    ]
    table.release()
    found = pool.map([], [cache])
    assert [found.pages[page_id].colour for page_id in cache.page_ids] == [CACHED, CACHED]
    assert "the prefix cache" in found.tells(found.pages[cache.page_ids[0]])


def test_open_pages_are_told_from_quantised_ones():
    pool = PagePool(1, 8, 16, 2, 64, k_format="q4", v_format="q4")
    table = grown(pool, 20)
    found = pool.map([table])
    assert [found.pages[page_id].is_open for page_id in table.page_ids] == [False, True]
    assert [found.pages[page_id].sign for page_id in table.page_ids] == ["A", "a"]
    assert "q4/q4, 1 open" in found.summary()


def test_rows_are_as_wide_as_asked(pool):
    *rows, summary = pool.map().text(columns=5).splitlines()
    assert [len(row) for row in rows] == [5, 5, 2] and "12 free" in summary


def test_a_notebook_gets_a_cell_for_each_page_that_tells_what_it_is(pool):
    table = grown(pool, 6)
    cells = ET.fromstring(pool.map([table])._repr_html_()).findall(".//span")
    assert len(cells) == 12
    first = table.page_ids[0]
    assert cells[first].get("title") == f"page {first}: held by sequence 0"
    assert COLOURS[0] in cells[first].get("style")


def test_names_cannot_break_out_of_the_html():
    figures = {
        "page_size": 4, "total": 1, "pages": {0: [1, False]},
        "sequences": [{"name": '"><script>', "tokens": 4, "pages": [0]}],
    }  # fmt: skip
    assert "<script>" not in PoolMap(figures)._repr_html_()


def test_figures_that_went_through_json_give_the_same_map(pool):
    figures = page_figures(pool.allocator, [("a", grown(pool, 6))], (), None, ())
    assert PoolMap(json.loads(json.dumps(figures))).pages == PoolMap(figures).pages


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_has_a_square_for_each_page(pool, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    table = grown(pool, 6)
    found = pool.map([table])
    assert found.save(tmp_path / f"map.{suffix}").stat().st_size > 1000
    squares = [patch.get_facecolor() for patch in found.figure().axes[0].patches]
    assert len(squares) == 12
    assert squares[table.page_ids[0]] != squares[-1]


def test_another_kind_of_picture_is_refused(pool, tmp_path):
    with pytest.raises(ValueError, match=r"\[PoolMap.save\] path must end in .png or .svg"):
        pool.map().save(tmp_path / "map.gif")
    assert not list(tmp_path.iterdir())
