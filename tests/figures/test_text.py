import numpy as np
import pandas as pd
import pytest

from tl_crosscoder.figures.text import cell, number, token_text, visible
from tl_crosscoder.report.example import Example


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "–"),
        (None, "–"),
        (pd.NA, "–"),
        (pd.NaT, "–"),
        (float("inf"), "∞"),
        (-np.inf, "−∞"),
        (0.0, "0"),
        (np.float32(0.5), "0.5"),
        (-0.12345, "−0.123"),
        (12345.6, "12,346"),
        (np.int64(-1234567), "−1,234,567"),
        (True, "yes"),
        (np.False_, "no"),
        ("-1 text", "-1 text"),
    ],
)
def test_a_cell_shows_a_value_as_people_read_it(value, shown):
    assert cell(value) == shown


def test_fixed_digits_and_per_cent():
    assert number(0.01234, digits=2, scale=100) == "1.23"
    assert number(-1234.5, digits=1) == "−1,234.5"


def test_whitespace_is_marked_and_keeps_its_place():
    assert token_text("a\n\nb\tc\r\nd") == "a↵↵\nb⇥\tc↵\nd"


def test_ordinary_writing_of_any_script_is_left_alone():
    text = "naïve 日本語 עברית العربية 👩‍👩‍👧 \n\t"
    assert visible(text) == text


def test_the_peak_is_the_largest_activation_that_is_a_number():
    nan = float("nan")
    assert Example("s", 0, list("abc"), [nan, 1.0, 3.0], [0.0] * 3, [0.0] * 3).peak == 2
