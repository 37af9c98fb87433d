"""Is a latent about a word?  Then that two seeds both find it says little: the word is in the data of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch, run
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.studies.gate_audit.gates import Beginning
from tl_crosscoder.studies.pool import Pool

TOP_TOKENS, TOP_TYPES = 200, 20
MASS, BITS, JACCARD = 0.5, 1.0, 0.5


@dataclass(frozen=True)
class Words:
    """The token types among a latent's 200 strongest tokens: ``ids``, at most 20, heaviest first, and their ``share`` of the
    activation there.  ``bits``: entropy of all the shares."""

    ids: list[int]
    share: list[float]
    bits: float

    @property
    def lexical(self) -> bool:
        """One type has half of the activation, or the types together less than one bit."""
        return bool(self.share) and (self.share[0] >= MASS or self.bits < BITS)


class TopTokens(Analysis):
    """The strongest tokens of some latents, with their ids."""

    def __init__(self, crosscoder: Crosscoder, corpus: Corpus, latents: Sequence[int]):
        super().__init__(crosscoder)
        self.corpus, self.pool = corpus, Pool(TOP_TOKENS)
        self.wanted = np.zeros(crosscoder.d_sae, dtype=bool)
        self.wanted[list(latents)] = True

    def update(self, batch: EncodedBatch) -> None:
        latent, token = batch.codes.latents.cpu().numpy(), batch.tokens.cpu().numpy()
        here = np.flatnonzero(self.wanted[latent])
        ids = token_ids(self.corpus, batch.sequence.cpu().numpy(), batch.position.cpu().numpy())
        self.pool.add(latent[here], batch.codes.values.float().cpu().numpy()[here], token=ids[token[here]])

    def columns(self) -> Columns:
        return {}


def token_ids(corpus: Corpus, sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The id of each token of a located batch."""
    return corpus.ids.numpy()[corpus.offsets.numpy()[sequence] + position]


def words_of(
    crosscoder: Crosscoder, store: PairedActivations, latents: Sequence[int], max_tokens: int | None = None
) -> dict[int, Words]:
    """What each latent's strongest tokens are."""
    if not len(latents):
        return {}
    tops = TopTokens(crosscoder, store.corpus, latents)
    run(crosscoder, Beginning(store, max_tokens), [tops])
    found = tops.pool.table()
    none = Words([], [], 0.0)
    if found.empty:
        return {int(j): none for j in latents}
    heard = {int(j): _words(rows) for j, rows in _by_latent(found)}
    return {int(j): heard.get(int(j), none) for j in latents}


def same_words(a: Words, b: Words) -> bool:
    """Both lexical, and at least half of their types the same: a match of these two is a match of words."""
    mine, other = set(a.ids), set(b.ids)
    return a.lexical and b.lexical and len(mine & other) >= JACCARD * len(mine | other)


def _words(rows: pd.DataFrame) -> Words:
    ids, place = np.unique(rows["token"].to_numpy(int), return_inverse=True)
    share = np.bincount(place, weights=rows["key"].to_numpy(float))
    share = share / share.sum()
    order = np.argsort(-share, kind="stable")[:TOP_TYPES]
    return Words(ids[order].tolist(), share[order].tolist(), float(-(share * np.log2(share)).sum()))


def _by_latent(rows: pd.DataFrame) -> Any:
    return rows.groupby("latent")
