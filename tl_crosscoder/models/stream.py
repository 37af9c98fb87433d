"""stream: training batches captured as they are needed, for corpora whose activations no disk would hold."""

from dataclasses import asdict
from functools import cached_property
from typing import Any

from torch import Tensor

from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.harvest import Harvest, OnNonFinite, Pair
from tl_crosscoder.models.mixing import MixedBatches, fingerprints
from tl_crosscoder.models.shards import in_groups


def stream(
    pair: Pair,
    corpus: Corpus,
    *,
    batch_size: int,
    buffer_tokens: int = 65_536,
    seed: int = 0,
    drop: Drop | None = None,
    max_tokens: int = 4096,
    shard_tokens: int = 65_536,
    on_nonfinite: OnNonFinite = "error",
    drop_last: bool = False,
) -> "StreamedActivations":
    """The batches of ``capture(pair, corpus).shuffled(batch_size, seed)``, on the pair's device, without a store.

    They are the same to the bit where ``drop``, ``max_tokens`` and ``shard_tokens`` are those of the capture, which decide
    what goes through the models together, and ``buffer_tokens`` is the store's ``buffer_rows``.  Every epoch runs both
    models over the whole corpus again; a store is cheaper from the second epoch on.
    """
    harvest = Harvest(
        pair, corpus, Drop() if drop is None else drop, max_tokens=max_tokens, on_nonfinite=on_nonfinite
    )
    return StreamedActivations(harvest, batch_size, buffer_tokens, seed, drop_last, shard_tokens)


class StreamedActivations(MixedBatches):
    """Random float32 batches of every token that stays; see :class:`MixedBatches` for their order and for resuming.

    It has no length: how many tokens are attention sinks is known only when they were captured.
    """

    def __init__(
        self,
        harvest: Harvest,
        batch_size: int,
        buffer_tokens: int,
        seed: int,
        drop_last: bool,
        shard_tokens: int = 65_536,
    ):
        if min(batch_size, buffer_tokens, shard_tokens) < 1:
            raise ValueError(
                f"batch_size={batch_size}, buffer_tokens={buffer_tokens}, shard_tokens={shard_tokens}; "
                "wanted 1 or more each."
            )
        super().__init__(batch_size, seed, buffer_tokens, drop_last)
        self.harvest, self.buffer_tokens, self.shard_tokens = harvest, buffer_tokens, shard_tokens

    def __length_hint__(self) -> int:
        """Batches in an epoch if no token were a sink."""
        return -(-self.harvest.candidates // self.batch_size)

    @property
    def widths(self) -> tuple[int, ...]:
        harvest = self.harvest
        return tuple(harvest.pair.description().get("widths") or [harvest.d_in] * harvest.n_models)

    @cached_property
    def _groups(self) -> list[Tensor]:
        parts = in_groups(self.harvest.corpus, self.shard_tokens, self.harvest.max_tokens)
        return [group for part in parts for group in part]

    @property
    def _n_blocks(self) -> int:
        return len(self._groups)

    @property
    def _rows_at_most(self) -> int:
        return self.harvest.candidates

    def _read(self, block: int) -> Tensor:
        self.harvest.skipped = self.skipped
        harvested = self.harvest.batch(self._groups[block])
        self.skipped = self.harvest.skipped
        return harvested.x

    def _data(self) -> dict[str, Any]:
        harvest = self.harvest
        return {
            "blocks": "captured together",
            "models": fingerprints(harvest.pair.description()),
            "corpus_sha256": harvest.corpus.sha256,
            "dtype": str(harvest.dtype).removeprefix("torch."),
            "drop": asdict(harvest.drop),
            "max_tokens": harvest.max_tokens,
            "shard_tokens": self.shard_tokens,
        }
