"""hf_cifar.tables."""

from hf_cifar.tables import render_numbers


def test_numbers_that_follow_each_other_are_one_range():
    assert render_numbers([7, 3, 18, 17, 19]) == "3, 7, 17-19"
    assert render_numbers(range(5)) == "0-4"
    assert render_numbers([]) == ""
