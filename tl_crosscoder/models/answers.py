"""Both models' own answers: text on which base and fine-tune go apart, which no fixed corpus holds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_crosscoder.models.backends.generation import stop_and_pad
from tl_crosscoder.models.chats import ASSISTANT, SPECIAL, TEMPLATE, Marked, tokenise_chats
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.tokenizer import special_ids


def own_answers(
    pair: Any,
    prompts: Corpus | Sequence[Any],
    *,
    max_new_tokens: int = 36,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Corpus:
    """Prompt and answer for each prompt, all of base's (source ``answers_base``), then all of tuned's (``answers_tuned``).

    ``prompts``: a corpus made by :meth:`Corpus.prompts`, or its questions.  The ids are the generated ones, never decoded and read
    again, up to and with the token that ends the turn.  Temperature 0 is greedy.
    """
    if pair.tokenizer is None:
        raise ValueError("answers need to know where a turn ends: make the pair with its tokenizer.")
    prompts = prompts if isinstance(prompts, Corpus) else Corpus.prompts(prompts, pair.tokenizer)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    stops = turn_ends(pair)
    parts = [
        _answers(backend, prompts, stops, special_ids(pair.tokenizer), source, batch_size, options)
        for backend, source in ((pair.base, "answers_base"), (pair.tuned, "answers_tuned"))
    ]
    return parts[0] + parts[1]


def turn_ends(pair: Any) -> frozenset[int]:
    """What ends an answer: the tokenizer's and the models' end tokens, and the template's own after an answer."""
    ends = [stop_and_pad(backend.model, pair.tokenizer, None)[0] for backend in (pair.base, pair.tuned)]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [(ids, flags)] = tokenise_chats([chat], pair.tokenizer)
    spoken = np.flatnonzero((flags & ASSISTANT > 0) & (flags & TEMPLATE == 0))
    end = slice(spoken[-1] + 1, spoken[-1] + 2)
    return frozenset().union(*ends, ids[end][flags[end] & SPECIAL > 0].tolist())


def _answers(
    backend: Any,
    prompts: Corpus,
    stops: frozenset[int],
    special: frozenset[int],
    source: str,
    batch_size: int,
    options: dict[str, Any],
) -> Corpus:
    answered: dict[int, Marked] = {}
    for number, group in enumerate(prompts.order().split(batch_size)):
        sampling = options | {"seed": options["seed"] + number}
        new = backend.generate(prompts.batch(group, pad="left"), stop_ids=stops, **sampling).cpu()
        for sequence, answer in zip(group.tolist(), new.numpy(), strict=True):
            answered[sequence] = _joined(prompts, sequence, answer, stops, special)
    return Corpus.from_sequences([answered[sequence] for sequence in range(len(prompts))], source)


def _joined(
    prompts: Corpus, sequence: int, answer: np.ndarray, stops: frozenset[int], special: frozenset[int]
) -> Marked:
    ends = np.flatnonzero(np.isin(answer, sorted(stops)))
    answer = answer[: ends[0] + 1] if len(ends) else answer
    flags = np.full(len(answer), ASSISTANT)
    flags[np.isin(answer, sorted(special))] |= SPECIAL
    if len(ends):
        flags[-1] |= TEMPLATE
    asked, said = prompts.marked(sequence)
    return np.concatenate([asked, answer]), np.concatenate([said, flags])
