from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from hf_cifar.report.charts import (
    Axes,
    interval_bars,
    interval_dots,
    label_places,
    line_chart,
    log_ticks,
    reliability_diagram,
    thinned,
    ticks,
    trade_off,
)

BINS = [
    {"low": 0.4, "high": 0.6, "num_images": 10, "accuracy": 0.3, "confidence": 0.55},
    {"low": 0.8, "high": 1.0, "num_images": 90, "accuracy": 0.9, "confidence": 0.95},
]


def elements(svg, name):
    root = ElementTree.fromstring(f"<div>{svg}</div>")
    return [element for element in root.iter() if element.tag == name]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 10, [0, 2, 4, 6, 8, 10]), (3, 4.1, [3, 3.2, 3.4, 3.6, 3.8, 4])],
)  # fmt: skip
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert ticks(low, high) == expected


def test_axes_map_the_range_to_the_chart():
    axes = Axes((0, 4), (1, 3))
    assert axes.x(0) < axes.x(4) and axes.y(1) > axes.y(3)
    assert axes.x(2) == pytest.approx((axes.x(0) + axes.x(4)) / 2)


def test_line_chart_draws_every_point_and_names_its_lines():
    svg = line_chart(
        "Loss", {"train": [(1, 2.0), (2, 1.0)], "validation <a>": [(2, 1.5)]}, "epoch", "loss"
    )
    lines = elements(svg, "polyline")
    assert [len(line.get("points").split()) for line in lines] == [2, 1]
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 360 and 0 <= y <= 240
    assert [item.find("span").tail for item in elements(svg, "li")] == ["train", "validation <a>"]
    assert "train from 2 to 1" in elements(svg, "desc")[0].text


def test_a_logarithmic_axis_puts_equal_factors_at_equal_distances():
    line = [(1e-3, 1.0), (1e-2, 2.0), (1e-1, 3.0)]
    svg = line_chart("Race", {"rung": line}, "rate", "loss", log_x=True)
    (polyline,) = elements(svg, "polyline")
    xs = [float(point.split(",")[0]) for point in polyline.get("points").split()]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    labels = [text.text for text in elements(svg, "text")]
    assert {"0.001", "0.01", "0.1"} <= set(labels)
    assert log_ticks(1.4e-4, 8.8e-4) == [1.4e-4, 8.8e-4]  # no power of ten between them


def test_constant_line_can_be_drawn():
    (line,) = elements(line_chart("Rate", {"rate": [(1, 0.5), (2, 0.5)]}, "x", "y"), "polyline")
    first, second = (point.split(",")[1] for point in line.get("points").split())
    assert first == second


def test_reliability_diagram_shows_accuracy_and_gap_of_each_bin():
    svg = reliability_diagram("Reliability", BINS)
    bars = {r.get("class"): [] for r in elements(svg, "rect")}
    for bar in elements(svg, "rect"):
        bars[bar.get("class")].append(float(bar.get("height")))
    axes = Axes((0, 1), (0, 1), 300)
    assert bars["gap overconfident"] == pytest.approx(
        [axes.y(0.3) - axes.y(0.55), axes.y(0.9) - axes.y(0.95)], abs=0.1
    )
    assert bars["bar"][:2] == pytest.approx(
        [axes.y(0) - axes.y(0.3), axes.y(0) - axes.y(0.9)], abs=0.1
    )
    underconfident = reliability_diagram("Reliability", [{**BINS[0], "accuracy": 0.6}])
    assert "gap underconfident" in underconfident and "gap overconfident" not in underconfident
    assert "accuracy is 0.30" in elements(svg, "desc")[0].text


def test_bars_have_lengths_of_their_values_and_whiskers():
    svg = interval_bars("Recall", {"cat": (0.5, [0.4, 0.6]), "dog": (1.0, None)}, "recall")
    bars = [float(r.get("width")) for r in elements(svg, "rect")]
    assert bars[0] == pytest.approx(bars[1] / 2, abs=0.1)
    assert len([p for p in elements(svg, "path") if p.get("class") == "whisker"]) == 1
    assert elements(svg, "desc")[0].text == "lowest cat 0.500, highest dog 1.000"


def test_a_trade_off_shows_every_point_and_joins_the_front():
    points = {
        "original": (4.0, 0.9, [0.88, 0.92]),
        "int8": (1.0, 0.89, [0.87, 0.91]),
        "slow": (8.0, 0.8, [0.7, 0.9]),
    }
    svg = trade_off("Accuracy and time", points, ["original", "int8"], "ms", "accuracy")
    dots = {
        title.text.partition(":")[0]: dot
        for title, dot in zip(elements(svg, "title")[1:], elements(svg, "circle"), strict=True)
    }
    assert [dots[name].get("class") for name in points] == [
        "dot series-0",
        "dot series-0",
        "dot series-1",
    ]
    places = {name: (float(dot.get("cx")), float(dot.get("cy"))) for name, dot in dots.items()}
    assert places["int8"][0] < places["original"][0] < places["slow"][0]
    assert places["original"][1] < places["int8"][1] < places["slow"][1]
    (line,) = elements(svg, "polyline")
    assert line.get("points") == " ".join(
        f"{x},{y}" for x, y in (places["int8"], places["original"])
    )
    assert len([each for each in elements(svg, "path") if each.get("class") == "whisker"]) == 3


# Positions of the versions of a real run, beside a far smaller network.
VERSIONS = {
    "original": (271.0, 31.0), "pruned to 0.7": (264.0, 37.0), "pruned to 0.4": (252.0, 42.0),
    "int8": (231.0, 33.0), "pruned to 0.7, int8": (215.0, 37.0), "pruned to 0.4, int8": (216.0, 40.0),
    "float16": (292.0, 30.0), "run cnn": (79.0, 158.0),
}  # fmt: skip


@pytest.mark.parametrize(
    "points",
    [
        {"original": (100.0, 20.0), "float16": (120.0, 20.0), "pruned to 0.5": (340.0, 90.0)},
        VERSIONS,
    ],
)
def test_labels_of_close_points_do_not_overlap_and_stay_inside(points):
    found = label_places(points)
    boxes = [
        (left, left + 6.6 * len(name), height - 10, height + 2)
        for name, (left, height) in found.items()
    ]
    dots = [(x - 4, x + 4, y - 4, y + 4) for x, y in points.values()]
    for number, (left, right, top, bottom) in enumerate(boxes):
        assert left >= 58 and right <= 360 and top >= 0 and bottom <= 240 - 38
        for low, high, above, below in boxes[number + 1 :] + dots:
            assert right <= low or high <= left or bottom <= above or below <= top


def test_only_many_points_are_averaged():
    points = [(float(x), 2.0 * x) for x in range(1000)]
    short = thinned(points, limit=100)
    assert len(short) == 100
    assert short[0] == (4.5, 9.0)
    assert thinned(points[:50], limit=100) == points[:50]


def test_ids_come_from_titles():
    chart = line_chart(
        "Validation accuracy", {"accuracy": [(1, 0.5), (2, 0.6)]}, "epoch", "accuracy"
    )
    assert (
        elements(chart, "svg")[0].get("aria-labelledby")
        == "validation-accuracy-title validation-accuracy-text"
    )
    assert chart == line_chart(
        "Validation accuracy", {"accuracy": [(1, 0.5), (2, 0.6)]}, "epoch", "accuracy"
    )


def test_interval_dots_show_each_series_on_one_scale():
    rows = {
        "cat": [(0.1, (0.05, 0.2)), (0.3, (0.25, 0.4))],
        "a very long name": [(0, (0, 0.1))] * 2,
    }
    svg = interval_dots("Shares", ["before", "after"], rows, "share")
    dots = [dot for dot in elements(svg, "circle") if dot.get("class").startswith("dot")]
    places = [float(dot.get("cx")) for dot in dots]
    assert [dot.get("class") for dot in dots] == ["dot series-0", "dot series-1"] * 2
    assert places[1] - places[2] == pytest.approx(3 * (places[0] - places[2]), abs=0.2)
    titles = [title.text for title in elements(svg, "title")]
    assert titles[1] == "cat: before 0.1000 [0.0500, 0.2000]; after 0.3000 [0.2500, 0.4000]"
    assert "a very long n…" in svg and '<span class="swatch series-1"></span>after' in svg
