"""hf_cifar.text."""

from hf_cifar.text import first_line, listed, one_line, render_numbers


def test_consecutive_numbers_are_one_range():
    assert render_numbers([7, 3, 18, 17, 19]) == "3, 7, 17-19"
    assert render_numbers(range(5)) == "0-4"
    assert render_numbers([]) == ""


def test_error_text_is_one_line_and_never_empty():
    error = ValueError(" two\n lines ")
    assert (one_line(error), one_line(error, 3), first_line(error)) == ("two lines", "two", "two")
    assert one_line(ValueError()) == first_line(ValueError()) == "ValueError"
    assert one_line("") == ""


def test_shortened_list_states_the_number_left_out():
    assert listed(["a", "b\nc"]) == listed(["a", "b\nc"], 2) == "a, b c"
    assert listed(range(1500), 2) == "0, 1 and 1,498 more"
    assert listed([]) == ""
