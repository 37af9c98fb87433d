"""Rows of text and chats out of files and datasets, before any tokenizer sees them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

ROWS_AT_ONCE = 64  # read, then counted, before more are read
CHATS, TEXTS = ("messages", "conversation"), ("text", "content")


@dataclass
class Rows:
    """What a source holds: documents, chats, or some of both."""

    texts: list[str] = field(default_factory=list)
    chats: list[Any] = field(default_factory=list)

    def __iadd__(self, other: "Rows") -> "Rows":
        self.texts += other.texts
        self.chats += other.chats
        return self


def read_file(path: str | Path) -> Rows:
    """``.txt``: documents between blank lines.  ``.jsonl``: an object a line, ``messages`` or ``text``."""
    path = Path(path)
    if path.suffix == ".txt":
        documents = path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n\n")
        return Rows(texts=[document.strip("\n") for document in documents if document.strip()])
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            return sort_rows(
                (_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()),
                None,
                str(path),
            )
    raise ValueError(
        f"{path}: known are .txt and .jsonl; for other formats pass the folder to Corpus.from_dataset."
    )


def read_dataset(
    name: str,
    split: str = "train",
    column: str | None = None,
    limit: int | None = None,
    config: str | None = None,
) -> Iterator[Rows]:
    """Rows of a Hub dataset, or of a local folder that ``datasets`` can read, a few at a time; ``limit`` counts rows."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"reading the dataset {name!r} needs: pip install datasets") from error
    rows = islice(load_dataset(name, config, split=split, streaming=True), limit)
    first = 0
    while part := list(islice(rows, ROWS_AT_ONCE)):
        yield sort_rows(part, column, f"{name}:{split}", first)
        first += len(part)


def sort_rows(rows: Iterable[dict[str, Any]], column: str | None, where: str, first: int = 0) -> Rows:
    """Text rows and chat rows apart, from ``column`` or from the first column with a known name; ``first`` numbers the rows."""
    sorted_rows = Rows()
    for number, row in enumerate(rows, first):
        known = [name for name in (*CHATS, *TEXTS) if name in row]
        name = column or next((name for name in known if row[name]), known[0] if known else None)
        value = row.get(name) if name else None
        if isinstance(value, str):
            sorted_rows.texts.append(value)
        elif isinstance(value, list):
            sorted_rows.chats.append(value)
        else:
            wanted = f"the column {column!r}" if column else f"one of {', '.join((*CHATS, *TEXTS))}"
            raise ValueError(
                f"{where}, row {number}: wanted {wanted} holding text or messages; it has {', '.join(row)}."
            )
    return sorted_rows


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {line!r:.80}") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{path}, line {number} is a {type(row).__name__}; wanted an object with 'messages' or 'text'."
        )
    return row
