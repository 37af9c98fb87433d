"""What every study returns: tables, a sentence, a picture, and a panel of the report."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pandas as pd

from tl_crosscoder.figures import Drawing, Panel
from tl_crosscoder.studies.records import records


@dataclass(frozen=True)
class StudyResult(ABC):
    """What a study found.  A new study subclasses it as a frozen dataclass with ``table`` among its fields, known by its ``key``.

    Fields are data frames or plain JSON, so that a result can be written and read back.  ``index`` names the columns of ``table``
    that head a row; ``title``, ``text`` (and the verdict, where ``says_verdict``) and ``notes`` are the words of its panel.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    text: ClassVar[str] = ""
    notes: ClassVar[tuple[str, ...]] = ()
    index: ClassVar[tuple[str, ...]] = ()
    says_verdict: ClassVar[bool] = True
    known: ClassVar[dict[str, type["StudyResult"]]] = {}
    table: pd.DataFrame

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if cls.known.setdefault(cls.key, cls).__qualname__ != cls.__qualname__:
            raise ValueError(
                f"two studies are called {cls.key!r}: {cls.known[cls.key].__name__}, {cls.__name__}"
            )

    @property
    @abstractmethod
    def verdict(self) -> str | list[str]:
        """One sentence with the figures, whatever they show; a list where several things were asked about."""

    @abstractmethod
    def plot(self) -> Drawing:
        """The picture; it shows itself in a notebook.  Raises NotDrawn where its data are absent."""

    def brief(self) -> pd.DataFrame:
        """What a terminal has room for: the table, or the rows and columns that a study puts first."""
        return self.table

    def panel(self, key: str | None = None, about: str = "") -> Panel:
        """This study's part of a report; ``about`` says what was asked where a study was run more than once."""
        shown = self.table.set_index(list(self.index)) if self.index and len(self.table) else self.table
        title = f"{self.title}: {about}" if about else self.title
        said = self.verdict if isinstance(self.verdict, list) else [self.verdict]
        findings = tuple(said) if self.says_verdict else ()
        made = Panel(key or self.key, title, self.text, table=shown, notes=self.notes, findings=findings)
        return made.drawn(self.plot)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every field, tables as records, and the verdict."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: records(v) if isinstance(v, pd.DataFrame) else v for k, v in values.items()}
        return {"study": self.key, **plain, "verdict": self.verdict}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, part: dict[str, Any]) -> "StudyResult":
        """The result that ``to_dict`` described; called on ``StudyResult``, of whichever study wrote it.

        A table that was not kept comes back empty.
        """
        made = cls.known[part["study"]] if cls is StudyResult else cls
        values = {}
        for field in fields(made):
            value = part.get(field.name)
            values[field.name] = _frame(value or []) if field.type is pd.DataFrame else value
        return made(**values)


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table; a column without any value is of numbers (NaN)."""
    table = pd.DataFrame(rows)
    empty = [name for name, column in table.items() if column.isna().all()]
    return table.astype(dict.fromkeys(empty, float))
