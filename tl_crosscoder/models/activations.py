"""PairedActivations: what two models made of the same tokens, raw units, in memory or on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.errors import CorruptFile, EmptyData
from tl_crosscoder.models.corpus import Corpus, Indices, split_groups
from tl_crosscoder.models.harvest import Pair
from tl_crosscoder.models.manifest import MANIFEST, read_manifest, refuse_other_description, refuse_other_pair
from tl_crosscoder.models.mixing import mixed_batches
from tl_crosscoder.models.shards import FileShard, Shard, check_shard

Run = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Located:
    """Rows of activations with the sequence of the corpus, and the position in it, that each row's token has."""

    x: Float[Tensor, "batch model d_in"]
    sequence: Int[Tensor, "batch"]
    position: Int[Tensor, "batch"]


class PairedActivations:
    """Tokens seen by every model: ``len`` counts them, ``manifest`` says of what and how, ``corpus`` has the text.

    Made by :func:`capture`, read again by :meth:`open`.  Its rows are those of ``runs``, (shard, start, stop) each.
    Iterating yields ``batches()``.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        manifest: dict[str, Any],
        corpus: Corpus,
        tokenizer: Any = None,
        runs: Sequence[Run] | None = None,
    ):
        whole = [(number, 0, len(shard)) for number, shard in enumerate(shards)]
        self.shards, self.manifest, self.corpus, self._tokenizer = shards, manifest, corpus, tokenizer
        self.runs = [run for run in (whole if runs is None else runs) if run[2] > run[1]]
        if not self.runs:
            raise EmptyData(
                "these activations hold no token; the drop policy or the choice of sequences left none."
            )

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> "PairedActivations":
        """The store in a folder, memory-mapped; ``verify=False`` checks the shards' headers, not their hashes.

        Raises CorruptFile for a shard that is missing, altered or hostile, naming it and how to make it again.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if len(manifest["shards"]) < manifest["n_shards"]:
            raise CorruptFile(
                f"{folder} holds {len(manifest['shards'])} of {manifest['n_shards']} shards: its capture was "
                "interrupted.  Run it again with the same arguments and it goes on from there."
            )
        shards = []
        for entry in manifest["shards"]:
            file, rows, digest = folder / entry["file"], entry["rows"], entry["sha256"]
            shape = (rows, manifest["n_models"], manifest["d_in"])
            check_shard(file, *shape, manifest["dtype"], digest if verify else None)
            shards.append(FileShard(file, rows))
        tokenizer = folder / "tokenizer"
        return cls(
            shards, manifest, stored_corpus(folder, manifest), tokenizer if tokenizer.is_dir() else None
        )

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self.runs)

    @property
    def d_in(self) -> int:
        return self.manifest["d_in"]

    @property
    def n_models(self) -> int:
        return self.manifest["n_models"]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer the corpus was made with; ValueError where there is none."""
        if self._tokenizer is None:
            raise ValueError("these activations were captured from token ids, without a tokenizer.")
        if not isinstance(self._tokenizer, Path):
            return self._tokenizer
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._tokenizer, local_files_only=True)

    def __iter__(self) -> Iterator[Float[Tensor, "batch model d_in"]]:
        return self.batches()

    def batches(self, size: int = 4096) -> Iterator[Float[Tensor, "batch model d_in"]]:
        """All rows in order, float32; the last batch may be smaller."""
        return (located.x for located in self.located(size))

    def located(self, size: int = 4096) -> Iterator[Located]:
        """All rows in order, float32, each with its place in the corpus."""
        pieces: list[Run] = []
        room = size
        for shard, start, stop in self.runs:
            while start < stop:
                end = min(stop, start + room)
                pieces.append((shard, start, end))
                room, start = room - (end - start), end
                if room == 0:
                    yield self._read(pieces)
                    pieces, room = [], size
        if pieces:
            yield self._read(pieces)

    def shuffled(
        self,
        batch_size: int,
        seed: int = 0,
        *,
        buffer_rows: int = 65_536,
        block_rows: int = 256,
        drop_last: bool = False,
    ) -> "ShuffledBatches":
        """Random float32 batches, for training; iterate again for the next epoch, in another order."""
        return ShuffledBatches(self, batch_size, seed, buffer_rows, block_rows, drop_last)

    def rows_of(self, sequence: int) -> Located:
        """The tokens of one sequence that are here, in order; none where all were dropped."""
        if not 0 <= sequence < len(self.corpus):
            raise IndexError(f"sequence {sequence}; the corpus has 0..{len(self.corpus) - 1}.")
        return self._read([self._places.get(sequence, (0, 0, 0))])

    def subset(self, sequences: Indices) -> "PairedActivations":
        """A view of these sequences only, which shares the shards and keeps their order."""
        chosen = np.unique(np.asarray(sequences, dtype=np.int64))
        if len(chosen) and (chosen[0] < 0 or chosen[-1] >= len(self.corpus)):
            raise IndexError(f"sequences {chosen[0]}..{chosen[-1]}; the corpus has {len(self.corpus)}.")
        merged: list[Run] = []
        for run in sorted(self._places[s] for s in chosen.tolist() if s in self._places):
            if merged and merged[-1][0] == run[0] and merged[-1][2] == run[1]:
                run = (run[0], merged.pop()[1], run[2])
            merged.append(run)
        return type(self)(self.shards, self.manifest, self.corpus, self._tokenizer, merged)

    def split(self, fraction: float, seed: int = 0) -> tuple["PairedActivations", "PairedActivations"]:
        """Two views that share no sequence and no conversation; the first has about ``fraction`` of the sequences.

        All answers to one prompt are on one side (:meth:`Corpus.conversations`).  Raises EmptyData where there is but one.
        """
        present = np.array(self.sequences)
        left, right = split_groups(self.corpus.conversations().numpy()[present], fraction, seed)
        return self.subset(present[left]), self.subset(present[right])

    @property
    def sequences(self) -> list[int]:
        """The sequences of the corpus that have a token here, ascending."""
        return sorted(self._places)

    def check_against(self, pair: Pair) -> None:
        """Raise PairMismatch unless this pair made these activations: weights, precision, hook and tokenizer."""
        refuse_other_pair(self.manifest, pair)

    def check_made_by(self, description: dict[str, Any]) -> None:
        """Raise PairMismatch unless the pair described, such as the one saved with a crosscoder, has these models and this hook."""
        refuse_other_description(self.manifest, description)

    @cached_property
    def _places(self) -> dict[int, Run]:
        """Sequence -> the rows that hold it, which are contiguous."""
        places = {}
        for shard, start, stop in self.runs:
            sequences, _ = self.shards[shard].places(start, stop)
            values, counts = torch.unique_consecutive(sequences, return_counts=True)
            ends = start + counts.cumsum(0)
            for value, end, count in zip(values.tolist(), ends.tolist(), counts.tolist(), strict=True):
                places[value] = (shard, end - count, end)
        return places

    def _read(self, pieces: Sequence[Run]) -> Located:
        parts = [self.shards[shard].acts(start, stop) for shard, start, stop in pieces]
        places = [self.shards[shard].places(start, stop) for shard, start, stop in pieces]
        sequence, position = (torch.cat(column).long() for column in zip(*places, strict=True))
        return Located(torch.cat(parts).float(), sequence, position)

    def __repr__(self) -> str:
        shape = f"{len(self):,} tokens, {self.n_models} models, d_in {self.d_in}"
        return f"PairedActivations({shape}, {self.manifest['hook']})"


def stored_corpus(folder: Path, manifest: dict[str, Any]) -> Corpus:
    """The corpus of a store; CorruptFile where it is not the one that was captured."""
    corpus = Corpus.load(folder / "corpus.safetensors")
    if corpus.sha256 != manifest["corpus_sha256"]:
        raise CorruptFile(
            f"{folder / 'corpus.safetensors'} is not the corpus of {MANIFEST}; capture it anew elsewhere."
        )
    return corpus


class ShuffledBatches:
    """Each iteration is one epoch: every token once, in an order that depends on ``seed`` and ``epoch`` alone.

    ``epoch`` counts the iterations begun; assign it to go back to one.  Blocks of neighbouring rows are read in random order
    from all shards into a buffer, and batches are drawn from it: reading stays nearly sequential.
    """

    def __init__(
        self,
        store: PairedActivations,
        batch_size: int,
        seed: int = 0,
        buffer_rows: int = 65_536,
        block_rows: int = 256,
        drop_last: bool = False,
    ):
        if min(batch_size, buffer_rows, block_rows) < 1:
            raise ValueError(
                f"batch, buffer and block of {batch_size}, {buffer_rows}, {block_rows}; wanted 1 or more."
            )
        self.store, self.batch_size, self.seed, self.epoch = store, batch_size, seed, 0
        self.buffer_rows, self.block_rows, self.drop_last = (
            min(buffer_rows, len(store)),
            block_rows,
            drop_last,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.store), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Float[Tensor, "batch model d_in"]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        yield from mixed_batches(self._blocks(rng), self.batch_size, self.buffer_rows, rng, self.drop_last)

    def _blocks(self, rng: np.random.Generator) -> Iterator[Tensor]:
        blocks = [
            (shard, at, min(at + self.block_rows, stop))
            for shard, start, stop in self.store.runs
            for at in range(start, stop, self.block_rows)
        ]
        for number in rng.permutation(len(blocks)):
            shard, start, stop = blocks[number]
            yield self.store.shards[shard].acts(start, stop)
