"""docs/troubleshooting.md speaks of messages that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_message_is_said_somewhere():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    messages = [words for cell in cells for words in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20
    sources = "".join(path.read_text() for path in (ROOT / "python").rglob("*.py"))
    said = re.sub(r'"\s*f?"', "", sources)  # strings that go on in the next line
    assert [message for message in messages if message not in said] == []
