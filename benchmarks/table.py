"""Write docs/benchmarks.md from the JSON lines: the newest record of each benchmark, for each device.

The tables of docs/techniques.md are written too, each below a line `<!-- measured: NAME -->`.

python -m benchmarks.table
"""

from __future__ import annotations

import json
import re
import statistics

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


MISSING = "Not measured yet.\n"
MARKED = re.compile(rf"(<!-- measured: (.+?) -->\n)(?:\n{MISSING}|(?:\n?\|.*\n)*)")


def techniques_page(page: str, records: list[dict]) -> str:
    """Return docs/techniques.md with the measured tables written again."""

    def written(mark: re.Match) -> str:
        tables = {"race": races, "reject": rejections, "update": updates}
        found = tables[mark[2]](records) if mark[2] in tables else effects(mark[2], records)
        return f"{mark[1]}\n{found}"

    return MARKED.sub(written, page)


def races(records: list[dict]) -> str:
    """Return a table with the learning rate and accuracy of the best complete run of a sweep, of the default,
    of the race, and of a range test, by model and data set."""
    found = [record for record in records if record["benchmark"].startswith("race: ")]
    if not found:
        return MISSING
    picks = list(found[0]["picks"])
    lines = [
        f"| accuracy on test | best of the sweep | {' | '.join(picks)} |",
        f"| --- | --- |{' --- |' * len(picks)}",
    ]
    for record in sorted(found, key=lambda record: record["benchmark"]):
        sweep = {rate: each["test"] for rate, each in record["sweep"].items()}
        best = max(sweep, key=lambda rate: sweep[rate])
        cells = [f"{sweep[best]:.4f} at {best}"]
        cells += [
            f"{record['best']['test'] - record['loss'][name]['test']:.4f} at {record['picks'][name]:g}"
            for name in picks
        ]
        lines.append(f"| {record['benchmark'].removeprefix('race: ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def updates(records: list[dict]) -> str:
    """Return a table with the accuracy on test of old and new classes after each update, and what is lost, as
    means with standard deviations over seeds."""
    found = [
        record for record in records if record["benchmark"] == "update, two classes after eight"
    ]
    if not found:
        return MISSING
    record = found[-1]
    columns = {
        "lost": "lost on old classes",
        "old": "old classes",
        "new": "new classes",
        "all": "all",
    }
    lines = [
        f"| accuracy on test, n = {record['n']} | {' | '.join(columns.values())} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    for name in record["figures"]:
        values = [[run[name][column] for run in record["runs"]] for column in columns]
        lines.append(f"| {name} | {' | '.join(map(mean_and_spread, values))} |")
    return "\n".join(lines) + "\n"


def mean_and_spread(values: list[float]) -> str:
    """Format a mean with its standard deviation, which one value does not have."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def rejections(records: list[dict]) -> str:
    """Return a table with what each rule of --reject keeps and rejects, and its 95% interval, by model."""
    by_model = {
        record["benchmark"].removeprefix("reject, "): record
        for record in records
        if record["benchmark"].startswith("reject, ")
    }
    if not by_model:
        return MISSING
    heads = [f"{model}, n = {each['n']}" for model, each in by_model.items()]
    lines = [f"| share of images | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for kind in next(iter(by_model.values()))["figures"]:
        cells = []
        for record in by_model.values():
            rule, _, what = kind.partition(": ")
            mean = statistics.mean(each[rule][what]["share"] for each in record["runs"])
            low, high = record["intervals"][kind]
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def effects(technique: str, records: list[dict]) -> str:
    """Return a table with the mean and standard deviation of each variant of a technique, by model, and the
    paired difference from the first variant with its 95% interval."""
    by_model = {
        record["benchmark"].removeprefix(f"{technique}, "): record
        for record in records
        if record["benchmark"].startswith(f"{technique}, ")
    }
    if not by_model:
        return MISSING
    unit = next(iter(by_model.values()))["unit"]
    variants = list(dict.fromkeys(name for each in by_model.values() for name in each["values"]))
    heads = [
        f"{model}, n = {record['n']}{on_gpu(record['device'])}"
        for model, record in by_model.items()
    ]
    lines = [f"| {unit} on test | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for variant in variants:
        cells = [effect(record, variant) for record in by_model.values()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def on_gpu(device: str) -> str:
    """Render the name of a GPU; processors, most of the devices, are left out."""
    return "" if device.endswith("cores") else f", {device}"


def effect(record: dict, variant: str) -> str:
    """Render `0.5120 ± 0.0031, +0.0120 (+0.0046 to +0.0194)`."""
    values = record["values"].get(variant)
    if values is None:
        return ""
    text = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    if gain := record.get("differences", {}).get(variant):
        low, high = gain["interval"]
        text += f", {gain['mean']:+.4f} ({low:+.4f} to {high:+.4f})"
    return text


def main() -> None:
    """Rewrite the pages."""
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
    techniques = ROOT / "docs" / "techniques.md"
    records = [record for by_name in newest.values() for record in by_name.values()]
    techniques.write_text(techniques_page(techniques.read_text(), records))


if __name__ == "__main__":
    main()
