"""Passages of a store for and against a latent: where it fires how strongly, and where it is silent."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from tl_crosscoder.analysis.base import encoded
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.studies.judge import Passage

BEFORE, AFTER = 16, 8
EDGES = (
    0.25,
    0.5,
    0.75,
)  # of the latent's largest activation here; a passage is in the bin of its own largest
BINS = ("up to 25 %", "25-50 %", "50-75 %", "above 75 %")
FAR = 1 << 24  # more than a sequence has tokens


class Passages:
    """All firings of a few latents on the first ``max_tokens`` tokens of a store, in two halves that share no conversation.

    What an explainer is shown comes from one half, what a judge is asked about from the other.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        store: PairedActivations,
        latents: Sequence[int],
        *,
        max_tokens: int,
        seed: int,
    ):
        self.corpus, self.tokenizer = store.corpus, store.tokenizer
        wanted = torch.tensor(sorted(set(latents)))
        places, owner, values, key = [], [], [], []
        seen = 0
        for batch in encoded(crosscoder, store):
            places.append(_key(batch.sequence, batch.position))
            few = batch.codes.only(wanted.to(batch.codes.latents.device))
            owner.append(few.latents.cpu().numpy())
            values.append(few.values.float().cpu().numpy())
            key.append(places[-1][few.tokens().cpu().numpy()])
            seen += len(batch.codes)
            if seen >= max_tokens:
                break
        self.places = np.concatenate(places) if places else np.zeros(0, np.int64)
        owners, all_values, keys = (np.concatenate(part) for part in (owner, values, key))
        self.fired = {int(j): _sorted(keys[owners == j], all_values[owners == j]) for j in wanted.tolist()}
        shown = np.array(store.split(0.5, seed)[0].sequences)
        self.shown = np.isin(self.places // FAR, shown)
        self._shown = shown
        self.words: dict[int, str] = {}

    @property
    def digest(self) -> str:
        """sha256 of the text and of every firing."""
        whole = hashlib.sha256(self.corpus.sha256.encode() + self.places.tobytes())
        for latent, (key, value) in self.fired.items():
            whole.update(str(latent).encode() + key.tobytes() + value.tobytes())
        return whole.hexdigest()

    def strongest(self, latent: int, n: int) -> list[Passage]:
        """The strongest passages of the half that is shown, one a sequence."""
        key, value = self._peaks(latent)
        mine = np.isin(key // FAR, self._shown)
        order = np.argsort(-value[mine], kind="stable")[:n]
        return [self.passage(latent, k) for k in key[mine][order].tolist()]

    def firing(self, latent: int, n: int, rng: np.random.Generator) -> dict[str, list[Passage]]:
        """Up to ``n`` passages of the other half for each bin of activation, one a sequence."""
        key, value = self._peaks(latent)
        bins = np.searchsorted(EDGES, value / value.max()) if len(value) else np.zeros(0, int)
        other = ~np.isin(key // FAR, self._shown)
        return {name: self._drawn(latent, key[other & (bins == b)], n, rng) for b, name in enumerate(BINS)}

    def silent(self, latent: int, n: int, rng: np.random.Generator) -> dict[str, list[Passage]]:
        """Up to ``n`` passages of the other half without a firing: ``random``, and ``similar``: around a token of the kind that
        excites the latent in the examples shown."""
        key = self.fired[latent][0]
        free = self.places[~self.shown]
        start = np.maximum(free % FAR - BEFORE, 0) + free // FAR * FAR
        quiet = free[np.searchsorted(key, start) == np.searchsorted(key, free + AFTER, side="right")]
        peaks, value = self._peaks(latent)
        mine = np.isin(peaks // FAR, self._shown)
        best = peaks[mine][np.argsort(-value[mine], kind="stable")[:n]]
        alike = quiet[np.isin(self._ids(quiet), self._ids(best))]
        return {"random": self._drawn(latent, quiet, n, rng), "similar": self._drawn(latent, alike, n, rng)}

    def passage(self, latent: int, key: int) -> Passage:
        """The window around a place, with the latent's activation on each token."""
        sequence, position = divmod(key, FAR)
        ids = self.corpus.ids_of(sequence).tolist()
        window = range(max(0, position - BEFORE), min(len(ids), position + AFTER + 1))
        fired, value = self.fired[latent]
        at = (
            {int(k): float(v) for k, v in zip(fired, value, strict=True) if k // FAR == sequence}
            if len(fired)
            else {}
        )
        acts = tuple(at.get(sequence * FAR + p, 0.0) for p in window)
        return Passage(tuple(self._word(ids[p]) for p in window), acts)

    def _drawn(self, latent: int, keys: np.ndarray, n: int, rng: np.random.Generator) -> list[Passage]:
        chosen = rng.choice(keys, min(n, len(keys)), replace=False) if len(keys) else keys
        return [self.passage(latent, k) for k in chosen.tolist()]

    def _peaks(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each sequence the place of the largest activation, and the activation."""
        key, value = self.fired[latent]
        order = np.lexsort((-value, key // FAR))
        _, first = np.unique(key[order] // FAR, return_index=True)
        return key[order][first], value[order][first]

    def _ids(self, keys: np.ndarray) -> np.ndarray:
        places = self.corpus.offsets.numpy()[keys // FAR] + keys % FAR
        return self.corpus.ids.numpy()[places]

    def _word(self, token: int) -> str:
        if token not in self.words:
            self.words[token] = self.tokenizer.decode([token])
        return self.words[token]


def _key(sequence: torch.Tensor, position: torch.Tensor) -> np.ndarray:
    return sequence.cpu().numpy().astype(np.int64) * FAR + position.cpu().numpy().astype(np.int64)


def _sorted(key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(key, kind="stable")
    return key[order], value[order]
