"""The page about the course chapter is a program that runs, and it does all eight tasks."""

import re
from pathlib import Path

CHAPTER = Path(__file__).parents[2] / "docs" / "chapter.md"


def test_the_eight_tasks_of_the_chapter_run_as_written(capsys):
    text = CHAPTER.read_text()
    assert re.findall(r"^## Task (\d)", text, re.M) == list("12345678")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) >= 8
    program = {}
    for block in blocks:
        exec(compile(block, CHAPTER.name, "exec"), program)
    printed = capsys.readouterr().out
    assert "paged saves 73.0%, and with a shared prefix 75.2%" in printed
    assert "Short sequences:\n  Traditional: " in printed
