"""Write docs/benchmarks.md from the JSON lines: the newest record of each benchmark, for each device.

python -m benchmarks.table
"""

from __future__ import annotations

import json

from benchmarks.measure import RESULTS, ROOT

# Names in older records, and the names that the benchmarks write now.
RENAMED = {
    "ours, until it is whole": "ours, until complete",
    "the truth: images it has not seen": "true: unseen images",
    "the truth: on all others": "true: on all others",
    "32 px, as the checkpoint wants it": "32 px, the checkpoint's own preprocessing",
}

HEAD = """# Benchmarks

Written by `python -m benchmarks.table` from `benchmarks/results/*.jsonl`; `make bench` measures again.
Every ratio compares runs that took turns in one process tree, on the same images, model, batch
size and steps; above 1, the first variant is better. Median of n, with lowest and highest in brackets.
"""


def cell(values: dict[str, float]) -> str:
    """Render `median (lowest-highest)`."""
    return f"{values['median']:,.4g} ({values['low']:,.4g}-{values['high']:,.4g})"


def table(records: list[dict]) -> list[str]:
    """Return the table, one row for each variant of each benchmark."""
    lines = [
        "| benchmark | variant | value | first / variant | n |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in records:
        if "limits" in record:  # the number of passed checks says more than each difference
            passed = sum(
                values["median"] <= record["limits"][name]
                for name, values in record["figures"].items()
            )
            found = f"{passed} of {len(record['limits'])} passed"
            lines.append(f"| {record['benchmark']} | all checks | {found} |  | {record['n']} |")
            continue
        for name, values in record["figures"].items():
            ratio = cell(record["ratios"][name]) if name in record["ratios"] else ""
            if gain := record.get("differences", {}).get(name):
                low, high = gain["interval"]
                ratio = f"difference {gain['mean']:+.4f} ({low:+.4f} to {high:+.4f})"
            setting = f", {record['setting']}" if not ratio and "setting" in record else ""
            variant, value = RENAMED.get(name, name), f"{cell(values)} {record['unit']}"
            lines.append(
                f"| {record['benchmark']} | {variant}{setting} | {value} | {ratio} | {record['n']} |"
            )
    return lines


def main() -> None:
    """Rewrite the page."""
    page = [HEAD]
    newest: dict[str, dict[str, dict]] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            newest.setdefault(record["device"], {})[record["benchmark"]] = record
    for device, by_name in newest.items():
        records = list(by_name.values())
        versions = ", ".join(f"{name} {number}" for name, number in records[-1]["versions"].items())
        page += [f"## {device}", "", f"{versions}.", "", *table(records), ""]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
