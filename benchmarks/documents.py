"""Make the tables and pictures of the documents: `python -m benchmarks.documents --write`.

A document says where: `<!-- table: attention -->` up to `<!-- end of table -->` becomes what
`benchmarks/results/attention.json` holds. `benchmarks.pictures` draws, from records and with `pool.map()`.
"""

import argparse
import json
import re
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

from paged_mlx.machine.cache import write_whole

from benchmarks.harness import RESULTS
from benchmarks.pictures import pictures, shows

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "formats.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def tables(record: dict) -> str:
    """Markdown: a table for each run of cases with the same first candidate, and the machine."""
    if "table" in record:
        return _plain_table(record)
    parts = []
    for _, cases in groupby(record["cases"], key=lambda case: case["candidates"][0]["name"]):
        parts += [_table(list(cases)), ""]
    for (peer, reason), rows in sorted(_left_out(record).items()):
        parts += [f"Left out of {rows} rows: {peer}, {reason}.", ""]
    machine = record["machine"]
    hosted = "a hosted runner, whose times say little: " if machine.get("hosted_runner") else ""
    parts.append(
        f"{hosted}{machine['processor']}, {machine['cores']} cores, {machine['system']}, mlx "
        f"{record['versions']['mlx']}, {record['date']}; record: "
        f"`benchmarks/results/{record['question']}.json`."
    )
    return "\n".join(parts)


def _plain_table(record: dict) -> str:
    """A table that its benchmark has laid out itself, and what it is of."""
    heads, *rows = record["table"]
    lines = [heads, ["---"] * len(heads), *rows]
    made = f"{record['model']}, {record['backend']}, {record['date']}"
    record_of = f"record: `benchmarks/results/{record['question']}.json`."
    return "\n".join(
        [*("| " + " | ".join(cells) + " |" for cells in lines), "", f"{made}; {record_of}"]
    )


def _left_out(record: dict) -> Counter:
    """How often each (candidate, reason) is missing."""
    return Counter(
        about for case in record["cases"] for about in case["about"].get("left_out", {}).items()
    )


def _table(cases: list[dict]) -> str:
    """A row for each case: the first candidate's time or figure, and how the others compare."""
    first = cases[0]["candidates"][0]["name"]
    others = {c["name"]: c for case in cases for c in case["candidates"][1:]}
    heads = [f"share of {name}" if c.get("limit") else name for name, c in others.items()]
    rows = [
        f"| case | {first} | " + "".join(f"{head} | " for head in heads).rstrip(),
        "|---|---|" + "---|" * len(others),
    ]
    for case in cases:
        found = {c["name"]: c for c in case["candidates"]}
        if "figure" in case["about"]:
            cells = [_multiple(found.get(name), found[first]) for name in others]
            own = _figure(found[first]["median"], case["about"]["figure"])
        else:
            cells = [_compared(found.get(name), found[first]) for name in others]
            own = _time(found[first]["median"], case["about"])
        rows.append("| " + " | ".join([case["name"], own, *cells]) + " |")
    return "\n".join(rows)


def _figure(value: float, unit: str) -> str:
    return f"{value / 1e6:.1f} MB" if unit == "MB" else f"{value} {unit}"


def _multiple(candidate: dict | None, first: dict) -> str:
    """Of the first candidate's figure; the figure itself where that is 0."""
    if candidate is None:
        return ""
    value, base = candidate["median"], first["median"]
    return f"{value / base:.2f}x" if base else str(value)


def _compared(candidate: dict | None, first: dict) -> str:
    if candidate is None:
        return ""
    ratio = candidate["median"] / first["median"]
    return (
        f"{ratio:.0%}" if candidate.get("limit") else f"{ratio:.{2 if ratio < 3 else 1}f}x the time"
    )


def _time(seconds: float, about: dict) -> str:
    if "unit" in about:
        return f"{seconds / about['units'] * 1e6:.3g} us per {about['unit']}"
    return f"{seconds * 1e3:.2f} ms"


def with_tables(text: str, records: dict[str, dict]) -> str:
    """``text`` with the tables of ``records``; those of no record stay as they are."""

    def replaced(match: re.Match) -> str:
        begin, name, end = match.groups()
        return f"{begin}{tables(records[name])}\n{end}" if name in records else match.group()

    return MARKED.sub(replaced, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.documents", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write them; else only say which differ"
    )
    writes = parser.parse_args(arguments).write
    records = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    wanted = {path: with_tables(path.read_text(), records) for path in DOCUMENTS}
    stale = [path for path, text in wanted.items() if path.read_text() != text]
    for path, draw in pictures().items():
        picture = draw()
        if not path.exists() or shows(path.read_text()) != shows(picture):
            wanted[path] = picture
            stale.append(path)
    names = ", ".join(path.name for path in stale)
    if stale and not writes:
        print(f"not made from the records: {names}; --write makes them", file=sys.stderr)
        return 1
    for path in stale:
        write_whole(path, wanted[path])
    print(f"written: {names}" if stale else "all tables and pictures are those of the records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
