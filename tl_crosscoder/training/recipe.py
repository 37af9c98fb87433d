"""A published training, scaled to a run of one's own."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import Loss
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.shard import WHOLE, Shard
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.training.config import TrainConfig

#: Fewer tokens without firing say little: a latent that fires on one token in 3,000 is silent so long in one case of 30.
LEAST_DEAD_AFTER = 10_000


@dataclass(frozen=True)
class Recipe:
    """A published training, scaled to a run; change a part of it with ``dataclasses.replace``.

    ``settings``: the arguments of :class:`Crosscoder` beside the normaliser.  ``normalizer_settings``: those of
    ``Normalizer.fit``, None for raw activations.  ``notes``: what the source leaves open, and what differs from it here.
    """

    name: str
    source: str
    settings: Mapping[str, Any]
    losses: tuple[Loss, ...]
    config: TrainConfig
    batch_size: int
    normalizer_settings: Mapping[str, Any] | None
    notes: tuple[str, ...]

    def normalizer(self, batches: Any, max_tokens: int | None = None) -> Normalizer:
        """The normaliser of the recipe, fitted to the tokens of 100 batches unless told otherwise."""
        if self.normalizer_settings is None:
            return Normalizer.identity(2, self.settings["d_in"])
        tokens = 100 * self.batch_size if max_tokens is None else max_tokens
        return Normalizer.fit(batches, max_tokens=tokens, **self.normalizer_settings)

    def crosscoder(self, normalizer: Normalizer, shard: Shard = WHOLE) -> Crosscoder:
        """An untrained crosscoder of two models, with a sparsity of its own."""
        settings = {**self.settings, "sparsity": copy.deepcopy(self.settings["sparsity"])}
        return Crosscoder(**settings, normalizer=normalizer, shard=shard)


@dataclass(frozen=True)
class Preset:
    """What was published: ``tokens`` counts every visit of a token; the width is ``d_sae``, or ``expansion`` times d_in.

    ``k``: active latents per token in all; None where the weight of a loss decides.
    """

    build: Callable[["Run"], dict[str, Any]]
    tokens: int
    batch_size: int
    d_sae: int = 0
    expansion: int = 0
    k: int | None = None


@dataclass(frozen=True)
class Run:
    """What is asked for, in place of what was published."""

    preset: Preset
    d_in: int
    d_sae: int
    k: int
    batch_size: int
    steps: int
    seed: int

    def scaled_steps(self, published: int) -> int:
        """As large a share of the run as it was of the published one, a step at least."""
        return max(1, round(published * self._share))

    def dead_after(self, published: int) -> int:
        """The same for tokens without firing."""
        return max(
            LEAST_DEAD_AFTER, round(published * self._share * self.batch_size / self.preset.batch_size)
        )

    @property
    def _share(self) -> float:
        """Steps, of the published number."""
        return self.steps / (self.preset.tokens // self.preset.batch_size)

    def batch_topk(self, k: int, k_max: int | None = None, k_anneal_steps: int = 0) -> BatchTopK:
        """Its threshold follows the smallest kept score from published step 1000 on, with a memory of 1000 published steps."""
        memory = self.scaled_steps(1000)
        return BatchTopK(
            k,
            None if k_max is None else min(k_max, self.d_sae),
            0 if k_max is None else self.scaled_steps(k_anneal_steps),
            threshold_start=min(0.9, memory / self.steps),
            threshold_decay=1 - 1 / memory,
        )
