"""What every study shares: results that are written and read back, and parts that survive a kill."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import pytest

from tl_crosscoder.figures import Drawing, NotDrawn
from tl_crosscoder.studies import StudyResult
from tl_crosscoder.studies.parts import Parts


@dataclass(frozen=True)
class Weather(StudyResult):
    """A result with a table, a number and a nested record."""

    key: ClassVar = "weather"
    title: ClassVar = "Weather"
    text: ClassVar = "What fell."
    index: ClassVar = ("day",)
    table: pd.DataFrame
    warmest: float
    settings: dict

    @property
    def verdict(self) -> str:
        return f"The warmest day had {self.warmest:g} degrees."

    def plot(self) -> Drawing:
        if self.table.empty:
            raise NotDrawn("there was no day")
        return Drawing(lambda figure: figure.subplots().plot(self.table["rain"]) and None)


TABLE = pd.DataFrame({"day": ["a", "b"], "rain": [1.5, float("nan")], "snow": [float("nan")] * 2})


def test_a_result_is_read_back_as_it_was_written():
    written = Weather(TABLE, 3.5, {"place": ["x", 1]})
    read = StudyResult.from_dict(json.loads(written.to_json()))
    assert isinstance(read, Weather) and (read.warmest, read.settings) == (3.5, {"place": ["x", 1]})
    pd.testing.assert_frame_equal(read.table, TABLE)
    assert read.to_json() == written.to_json()


def test_a_panel_has_the_words_the_sentence_the_table_and_the_picture():
    panel = Weather(TABLE, 3.5, {}).panel("here", "in May")
    assert (panel.key, panel.title) == ("here", "Weather: in May")
    assert (panel.text, panel.findings) == ("What fell.", ("The warmest day had 3.5 degrees.",))
    assert panel.table is not None and list(panel.table.index) == ["a", "b"]
    assert panel.figure is not None and panel.figure.startswith("<svg")


def test_a_panel_without_data_says_so_in_place_of_the_picture():
    panel = Weather(TABLE.iloc[:0], 0.0, {}).panel()
    assert panel.figure is None and panel.notes == ("Not drawn: there was no day.",)


def test_a_table_that_was_not_kept_comes_back_empty():
    part = Weather(TABLE, 1.0, {}).to_dict()
    del part["table"]
    assert StudyResult.from_dict(part).table.empty


def test_two_studies_cannot_have_one_key():
    with pytest.raises(ValueError, match="two studies are called 'weather'"):
        type("Other", (Weather,), {"key": "weather"})


def test_a_part_is_computed_once_and_comes_back_as_json_gives_it(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"a": (1, 2), "b": float("inf")}

    first = Parts(tmp_path, seed=0, models="x")("one", compute)
    again = Parts(tmp_path, models="x", seed=0)("one", compute)
    assert first == again == Parts(None)("one", compute) == {"a": [1, 2], "b": float("inf")}
    assert len(calls) == 2  # the second of the three was read


def test_parts_of_other_settings_are_other_parts(tmp_path):
    assert Parts(tmp_path, seed=0)("one", lambda: 1) == 1
    assert Parts(tmp_path, seed=1)("one", lambda: 2) == 2
    assert Parts(tmp_path, seed=0)("one", lambda: 3) == 1


def test_a_part_that_failed_is_computed_again(tmp_path):
    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        Parts(tmp_path, seed=0)("one", fail)
    assert Parts(tmp_path, seed=0)("one", lambda: 1) == 1
