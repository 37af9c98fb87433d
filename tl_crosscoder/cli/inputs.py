"""What a verb's arguments name, opened: settings, models, text, prompts."""

import functools
import json
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_crosscoder.data.planted import Behaviour
    from tl_crosscoder.diffing.config import DiffConfig
    from tl_crosscoder.models.activations import PairedActivations
    from tl_crosscoder.models.corpus import Corpus
    from tl_crosscoder.models.pair import ModelPair


def diff_config(**settings: Any) -> "DiffConfig":
    """How to learn and rank; ValueError for settings that cannot be."""
    from tl_crosscoder.diffing.config import DiffConfig

    return DiffConfig(**settings)


def load_pair(
    base: str, tuned: str | None, adapter: str | None, hook: str, device: str, dtype: str
) -> "ModelPair":
    """Both models at one hook, on their device; ValueError unless one of ``tuned`` and ``adapter`` is given."""
    if (tuned is None) == (adapter is None):
        raise ValueError(
            f"give a fine-tuned model or --adapter, one of the two; got {tuned!r} and {adapter!r}."
        )
    from tl_crosscoder.models.pair import ModelPair

    return ModelPair.load(base, tuned, adapter=adapter, hook=hook, device=device, dtype=dtype)


def read_corpus(pair: "ModelPair", text: list[str], context: int, limit: int | None) -> "Corpus":
    """All sources in one corpus, each with the same share of ``limit`` tokens."""
    from tl_crosscoder.models.text_source import load_text_source

    each = -(-limit // len(text)) if limit else None
    parts = [load_text_source(source, pair.tokenizer, context=context, max_tokens=each) for source in text]
    return functools.reduce(operator.add, parts)


def read_lines(path: Path | None) -> list[str] | None:
    """The lines of a file that are not blank; None where the option was left out."""
    return (
        [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path
        else None
    )


def numbers(text: str | None, kind: type = int) -> list | None:
    """``"1,2,3"`` as numbers, at least one; None where the option was left out."""
    if text is None:
        return None
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"wanted numbers with commas between them, got {text!r}.")
    return found


def read_behaviours(path: Path | None) -> list["Behaviour"]:
    """The behaviours in a JSON file; none where the option was left out."""
    from tl_crosscoder.data.planted import Behaviour

    if path is None:
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    wanted = "a list of objects with name, keywords and heldout"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} wants {wanted}.")
    try:
        return [
            Behaviour(r.pop("name"), tuple(r.pop("keywords")), tuple(r.pop("heldout")), **r) for r in rows
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} wants {wanted}: {error}") from error


def plain_text(store: "PairedActivations", n: int) -> "Corpus | None":
    """The first ``n`` sequences of a store that are no answers of the models."""
    plain = [s for s in store.sequences if not store.corpus.sources[s].startswith("answers")][:n]
    return store.corpus.select(plain) if plain else None
