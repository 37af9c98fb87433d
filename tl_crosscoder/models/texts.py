"""Documents to token ids, in windows or one sequence each; how many tokens rows of documents and chats bring."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tl_crosscoder.models.chats import SPECIAL, Marked, as_messages, tokenise_chats, with_bos
from tl_crosscoder.models.text_files import Rows
from tl_crosscoder.models.tokenizer import special_ids

CHAT_CONTEXTS = 4  # chats are not cut into windows; of a file's or dataset's they keep this many contexts


def tokenise_texts(
    texts: Iterable[str], tokenizer: Any, *, context: int, windows: bool = True
) -> list[Marked]:
    """Ids and flag bits of each window of ``context`` tokens, or with ``windows=False`` of each document's first ``context``."""
    bos, special = tokenizer.bos_token_id, np.array(sorted(special_ids(tokenizer)))
    body = checked_context(context) - (bos is not None)
    documents = _documents(texts, tokenizer)
    if windows:
        stream = np.concatenate([np.zeros(0, dtype=np.int64), *documents])
        documents = [stream[at : at + body] for at in range(0, len(stream), body)]
    return [
        with_bos(ids[:body], np.isin(ids[:body], special) * SPECIAL, bos, SPECIAL)
        for ids in documents
        if len(ids)
    ]


def checked_context(context: int) -> int:
    """The same length; ValueError where a window would have no room beside BOS."""
    if context < 2:
        raise ValueError(
            f"context={context}; wanted at least 2 tokens, since the first of each sequence is BOS."
        )
    return context


def enough(parts: Iterable[Rows], max_tokens: int | None, tokenizer: Any, context: int) -> Rows:
    """The first parts of rows, as many as bring text for ``max_tokens``; all of them if that is None."""
    rows, found = Rows(), 0
    for part in parts:
        rows += part
        if max_tokens is not None:
            found += _count(part, tokenizer, context)
            if found >= max_tokens:
                break
    return rows


def _count(rows: Rows, tokenizer: Any, context: int) -> int:
    """Tokens that these rows bring at least, whatever others stand beside them."""
    texts = sum(len(ids) for ids in _documents(rows.texts, tokenizer))
    chats = tokenise_chats(as_messages(rows.chats), tokenizer) if rows.chats else []
    return texts + sum(min(len(ids), CHAT_CONTEXTS * context) for ids, _ in chats)


def _documents(texts: Iterable[str], tokenizer: Any) -> list[np.ndarray]:
    """The ids of each text that is not empty, without a BOS of its own."""
    bos = tokenizer.bos_token_id
    documents = [np.array(ids, dtype=np.int64) for ids in _encode([t for t in texts if t], tokenizer)]
    return [ids[ids[:1].tolist() == [bos] :] for ids in documents]


def _encode(texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
    """The ids of each text, a thousand texts at a time."""
    for at in range(0, len(texts), 1024):
        yield from tokenizer(texts[at : at + 1024], add_special_tokens=False, verbose=False)["input_ids"]
