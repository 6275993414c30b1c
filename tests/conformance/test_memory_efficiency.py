"""What paging and sharing save: the chapter's scenarios, and figures to check by hand."""

import pytest
from paged_mlx.course.memory_report import PrefixGroup, analyze_memory_efficiency
from paged_mlx.machine.memory import bytes_per_token


def test_memory_efficiency_of_the_chapters_batch():
    report = analyze_memory_efficiency(show=False)
    assert report.static.bytes == 16 * 2048 * 8 == 262144
    assert report.paged.bytes == 552 * 16 * 8
    assert f"{report.paged.saved:.1%}" == "73.0%"
    # 48 tokens, three pages, held once instead of 16 times
    assert report.shared.bytes == (552 - 15 * 3) * 16 * 8
    assert f"{report.shared.saved:.1%}" == "75.2%"


def test_memory_efficiency_prints_what_it_returns(capsys):
    report = analyze_memory_efficiency()
    printed = capsys.readouterr().out
    assert printed.rstrip() == str(report)
    for figure in ("262,144", "73.0%", "75.2%"):
        assert figure in printed


def test_memory_efficiency_of_static_allocation_in_bytes():
    # the chapter's batch of 8, 4096 tokens each, 32 layers of 4096 in bfloat16: 17.2 GB
    report = analyze_memory_efficiency(
        [4096] * 8, max_seq_len=4096, token_bytes=bytes_per_token(32, 32, 128), show=False
    )
    assert report.static.bytes == 8 * 4096 * 4096 * 32 * 2 * 2
    assert round(report.static.bytes / 1e9, 1) == 17.2
    assert report.paged.saved == 0.0 and report.static.waste == 0.0
    assert bytes_per_token(1, 1, 128, 2, v_head_dim=64) == 384


def test_memory_efficiency_counts_the_waste_in_the_last_page():
    report = analyze_memory_efficiency(
        [5, 8], max_seq_len=16, page_size=4, prefix_groups=[], show=False
    )
    assert (report.paged.slots, report.paged.unused_slots) == (16, 3)
    assert report.paged.waste == 3 / 16 and report.static.waste == 19 / 32
    assert report.shared == report.shared.__class__("shared", 4, 16, 3, 128, 0.5)
    assert report.saved_by_sharing == 0.0


def test_memory_efficiency_of_a_prefix_that_ends_inside_a_page():
    # 6 of 9 tokens are common: page 0 is shared, page 1 is copied by all but the last writer
    report = analyze_memory_efficiency(
        [9, 9, 9], page_size=4, prefix_groups=[(6, [0, 1, 2])], show=False
    )
    assert report.paged.slots == 9 * 4
    assert report.shared.slots == (1 + 3 * 2) * 4
    assert report.saved_by_sharing == pytest.approx(2 / 9)


def test_memory_efficiency_of_several_prefix_groups():
    groups = [PrefixGroup(8, (0, 2)), PrefixGroup(4, (1, 3, 4))]
    report = analyze_memory_efficiency([12] * 5, page_size=4, prefix_groups=groups, show=False)
    assert report.paged.slots == 5 * 12
    assert report.shared.slots == 5 * 12 - 8 - 2 * 4


def test_memory_efficiency_by_page_size_wastes_more_in_larger_pages():
    report = analyze_memory_efficiency(page_sizes=(64, 1, 16), show=False)
    sizes = [paged.page_size for paged, _ in report.by_page_size]
    assert sizes == [1, 16, 64]
    wastes = [paged.waste for paged, _ in report.by_page_size]
    assert wastes[0] == 0.0 and wastes == sorted(wastes)
    assert report.by_page_size[1] == (report.paged, report.shared)


def test_memory_efficiency_refuses_impossible_batches():
    for arguments, must in [
        (dict(lengths=[]), "lengths must have at least one sequence"),
        (dict(lengths=[0]), "lengths must be a whole number of at least 1"),
        (dict(page_size=0), "page_size must be"),
        (dict(token_bytes=0), "token_bytes must be"),
        (dict(max_seq_len=1499), "max_seq_len must be at least 1500"),
        (dict(page_sizes=[0]), "page_sizes must be"),
        (dict(prefix_groups=[(51, [0, 2])]), "length must be at most 50"),
        (dict(prefix_groups=[(4, [16])]), "members must be indices of lengths"),
        (dict(prefix_groups=[(4, [])]), "members must be indices"),
        (dict(prefix_groups=[(4, [0, 1]), (4, [1, 2])]), "each sequence once"),
    ]:
        with pytest.raises(ValueError, match=rf"^\[analyze_memory_efficiency\] .*{must}"):
            analyze_memory_efficiency(show=False, **arguments)
