"""The corpus behind a command-line word."""

from pathlib import Path
from typing import Any

from tl_crosscoder.models.corpus import Corpus


def load_text_source(
    source: str | Path,
    tokenizer: Any,
    *,
    context: int = 128,
    limit: int | None = None,
    max_tokens: int | None = None,
) -> Corpus:
    """The corpus behind a command-line word: a text or chat file, or ``DATASET[@CONFIG][:SPLIT[:COLUMN]]``.

    With ``max_tokens`` the first ones; of a dataset no more rows are read than they need.
    """
    if Path(source).is_file():
        corpus = Corpus.from_file(source, tokenizer, context=context)
        return corpus if max_tokens is None else corpus.take(max_tokens)
    if Path(source).suffix in (".txt", ".jsonl"):
        raise FileNotFoundError(
            f"there is no file {str(source)!r}; name a .txt or .jsonl file, or a dataset."
        )
    word, split, column = (*str(source).split(":"), "", "")[:3]
    name, _, config = (word, "", "") if Path(word).exists() else word.partition("@")
    return Corpus.from_dataset(
        name,
        tokenizer,
        split=split or "train",
        column=column or None,
        config=config or None,
        limit=limit,
        max_tokens=max_tokens,
        context=context,
    )
