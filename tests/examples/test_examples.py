"""Every example runs, and says of itself that it is right."""

import re
import runpy
from pathlib import Path

import pytest
from mlx_lm_ranks import Ranks

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENDS_WITH = {
    "agent": "is that of one contiguous sequence",
    "beam_search": "as by contiguous attention",
    "continuous_batching": "requests that made room: 4",
    "decoder": "the same tokens as by contiguous attention",
    "prefix_reuse": "the answers are those of mlx-lm's own caches",
}


@pytest.mark.parametrize("name", ENDS_WITH)
def test_an_example_checks_itself_and_says_what_it_has_shown(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.endswith(f"{ENDS_WITH[name]}\n")


def test_the_example_of_two_ranks_answers_on_both():
    command = [str(EXAMPLES / "two_ranks.py")]
    with Ranks(command, command) as ranks:
        assert ranks.wait() == [0, 0], ranks.outputs()
        said = [ranks.output(rank) for rank in range(2)]
    for rank in range(2):
        assert (
            f"rank {rank} of 2: 1 of 2 KV heads, 96 tokens known, answers of one machine"
            in said[rank]
        )


def test_the_guide_lists_the_examples_and_no_other():
    guide = (ROOT / "docs" / "guide.md").read_text()
    listed = re.findall(r"^\| `examples/([\w.]+)` \|", guide, re.M)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())
