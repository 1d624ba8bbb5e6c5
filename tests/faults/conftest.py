"""Tests that inject real faults. `make test-faults` runs them; the usual test run leaves them out."""

from pathlib import Path

import pytest

HEADER = "| # | fault | requirement | passed |\n| --- | --- | --- | --- |\n"
PAGE_MARKS = ("<!-- results -->\n", "<!-- end of results -->")


def pytest_addoption(parser):
    parser.addoption(
        "--write-table", metavar="PAGE", help="write the table of results into this page"
    )


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def record_result(record_property):
    """Function that records a row of the table, and fails the test unless all cases passed."""

    def record(number, fault, requirement, passed, cases):
        record_property("result", (number, fault, requirement, f"{passed}/{cases}"))
        assert passed == cases, f"{fault}: {passed} of {cases}"

    return record


def pytest_terminal_summary(terminalreporter, config):
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    rows = sorted(
        (value for report in reports for name, value in report.user_properties if name == "result"),
        key=lambda row: (str(row[0]).zfill(2), row[1]),  # some have no number
    )
    if not rows:
        return
    table = HEADER + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
    terminalreporter.write_line("\n" + table)
    page = config.getoption("--write-table", None)
    if page:
        text = Path(page).read_text()
        start, rest = text.split(PAGE_MARKS[0])
        end = rest.split(PAGE_MARKS[1])[1]
        Path(page).write_text(start + PAGE_MARKS[0] + table + PAGE_MARKS[1] + end)
