"""Make the README's table from a record: `python -m benchmarks.table [--check]`."""

import json
import sys
from pathlib import Path

from benchmarks.harness import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table: attention -->", "<!-- end of table -->"


def table(record: dict) -> str:
    """Markdown: one row for each case, times of the first candidate and ratios of the others."""
    names = [c["name"] for c in record["cases"][0]["candidates"]]
    rows = [
        f"| case | {names[0]} | " + " | ".join(f"{name}" for name in names[1:]) + " |",
        "|---|---|" + "---|" * len(names[1:]),
    ]
    for case in record["cases"]:
        medians = [c["median"] for c in case["candidates"]]
        ratios = " | ".join(f"{m / medians[0]:.1f}x the time" for m in medians[1:])
        rows.append(f"| {case['name']} | {medians[0] * 1e3:.2f} ms | {ratios} |")
    machine = record["machine"]
    note = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"mlx {record['versions']['mlx']}; record: `benchmarks/results/{record['question']}.json`."
    )
    return "\n".join([*rows, "", note])


def with_table(text: str, record: dict) -> str:
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


def main() -> None:
    record = json.loads((RESULTS / "attention.json").read_text())
    text = README.read_text()
    wanted = with_table(text, record)
    if "--check" in sys.argv:
        sys.exit(text != wanted)
    README.write_text(wanted)


if __name__ == "__main__":
    main()
