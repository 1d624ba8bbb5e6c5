"""Faults injected for real. `make test-faults` runs these; the usual test run leaves them out."""

from pathlib import Path

import pytest

HEADER = "| # | fault | what has to hold | figure |\n| --- | --- | --- | --- |\n"
PAGE_MARKS = ("<!-- figures -->\n", "<!-- end of figures -->")


def pytest_addoption(parser):
    parser.addoption("--write-figures", metavar="PAGE", help="put the table into this page")


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def figure(record_property):
    """figure(number, fault, what has to hold, good, of): a row of the table; a shortfall fails the test."""

    def record(number, fault, promise, good, of):
        record_property("figure", (number, fault, promise, f"{good}/{of}"))
        assert good == of, f"{fault}: {good} of {of}"

    return record


def pytest_terminal_summary(terminalreporter, config):
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    rows = sorted(
        (value for report in reports for name, value in report.user_properties if name == "figure"),
        key=lambda row: (str(row[0]).zfill(2), row[1]),  # some have no number
    )
    if not rows:
        return
    table = HEADER + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
    terminalreporter.write_line("\n" + table)
    page = config.getoption("--write-figures", None)
    if page:
        text = Path(page).read_text()
        start, rest = text.split(PAGE_MARKS[0])
        end = rest.split(PAGE_MARKS[1])[1]
        Path(page).write_text(start + PAGE_MARKS[0] + table + PAGE_MARKS[1] + end)
