"""stream: training batches captured as they are needed, for corpora whose activations no disk would hold."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.harvest import Harvest, OnNonFinite, Pair
from tl_crosscoder.models.mixing import mixed_batches


def stream(
    pair: Pair,
    corpus: Corpus,
    *,
    batch_size: int,
    buffer_tokens: int = 65_536,
    seed: int = 0,
    drop: Drop | None = None,
    max_tokens: int = 4096,
    on_nonfinite: OnNonFinite = "error",
    drop_last: bool = False,
) -> "StreamedActivations":
    """Random float32 batches like :meth:`PairedActivations.shuffled`, on the pair's device, without a store.

    Every epoch runs both models over the whole corpus again; a store is cheaper from the second epoch on.
    """
    harvest = Harvest(
        pair, corpus, Drop() if drop is None else drop, max_tokens=max_tokens, on_nonfinite=on_nonfinite
    )
    return StreamedActivations(harvest, batch_size, buffer_tokens, seed, drop_last)


class StreamedActivations:
    """Each iteration is one epoch: every token that stays, once, in an order that ``seed`` and ``epoch`` decide.

    It has no length: how many tokens are attention sinks is known only when they were captured.
    """

    def __init__(self, harvest: Harvest, batch_size: int, buffer_tokens: int, seed: int, drop_last: bool):
        if min(batch_size, buffer_tokens) < 1:
            raise ValueError(
                f"batch_size={batch_size}, buffer_tokens={buffer_tokens}; wanted 1 or more each."
            )
        self.harvest, self.batch_size, self.seed, self.epoch = harvest, batch_size, seed, 0
        self.buffer_tokens, self.drop_last = min(buffer_tokens, harvest.candidates), drop_last

    def __length_hint__(self) -> int:
        """Batches in an epoch if no token were a sink."""
        return -(-self.harvest.candidates // self.batch_size)

    def __iter__(self) -> Iterator[Float[Tensor, "batch model d_in"]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        self.harvest.skipped = 0
        yield from mixed_batches(self._blocks(rng), self.batch_size, self.buffer_tokens, rng, self.drop_last)

    def _blocks(self, rng: np.random.Generator) -> Iterator[Tensor]:
        corpus = self.harvest.corpus
        groups = corpus.groups(corpus.order(), self.harvest.max_tokens)
        for number in rng.permutation(len(groups)):
            yield self.harvest.batch(groups[number]).x
