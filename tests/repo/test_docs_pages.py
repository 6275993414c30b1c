"""The guide's examples are a program that runs."""

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "pages.md"


def test_the_examples_of_the_page_guide_run_and_say_what_the_guide_says(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    assert len(blocks) >= 7
    program = {}
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), program)
    assert capsys.readouterr().out == "free page: nobody holds page 1, at position 4\n"
