"""PairedActivations: what two models made of the same tokens, raw units, in memory or on disk."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.errors import CorruptFile, EmptyData, NonFiniteActs
from tl_crosscoder.models.corpus import Corpus, Indices, split_groups
from tl_crosscoder.models.entries import entries
from tl_crosscoder.models.harvest import SIDES, SKIPPED_AT_MOST, OnNonFinite, Pair
from tl_crosscoder.models.manifest import MANIFEST, read_manifest, refuse_other_description, refuse_other_pair
from tl_crosscoder.models.mixing import MixedBatches, fingerprints
from tl_crosscoder.models.shards import FileShard, Shard, check_shard, in_groups

Run = tuple[int, int, int]
BLOCK_ROWS = 256


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
                f"{folder} holds {len(entries(folder, manifest))} of {manifest['n_shards']} shards: its capture was "
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

    @property
    def widths(self) -> tuple[int, ...]:
        """Each model's own; its rows are zero from there up to ``d_in``."""
        return tuple(self.manifest["pair"].get("widths") or [self.d_in] * self.n_models)

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
        block_rows: int | None = None,
        drop_last: bool = False,
        on_nonfinite: OnNonFinite = "error",
    ) -> "ShuffledBatches":
        """Random float32 batches, for training; iterate again for the next epoch, in another order.

        Rows are read in blocks into a buffer from which batches are drawn.  ``block_rows``: so many neighbours a block; None
        makes a block of what was captured together, so that :func:`stream` gives the same batches, or of 256 rows of a
        view, which no stream gives.  Raises NonFiniteActs for NaN or Inf, unless ``on_nonfinite="skip"``, which leaves up
        to 0.1 % of the rows out of both models.
        """
        return ShuffledBatches(self, batch_size, seed, buffer_rows, block_rows, drop_last, on_nonfinite)

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

    @property
    def whole(self) -> bool:
        """Whether every row of the shards is here: not in a view that leaves some out."""
        return len(self) == sum(map(len, self.shards))

    def captured_together(self) -> list[Run]:
        """The rows of each group of sequences that went through the models together; none where all its tokens were dropped."""
        asked, runs = self.manifest["asked"], []
        groups = in_groups(self.corpus, asked["shard_tokens"], asked["max_tokens"])
        for number, part in enumerate(groups):
            at = 0
            for group in part:
                places = (self._places.get(sequence, (0, 0, 0)) for sequence in group.tolist())
                rows = sum(stop - start for shard, start, stop in places if shard == number)
                runs.append((number, at, at + rows))
                at += rows
        if sum(stop - start for _, start, stop in runs) != len(self):
            raise CorruptFile(
                f"the manifest says shards of {asked['shard_tokens']:,} tokens, which these shards of "
                f"{len(self):,} rows do not have; pass block_rows={BLOCK_ROWS}."
            )
        return runs

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


class ShuffledBatches(MixedBatches):
    """Random float32 batches of a store; see :class:`MixedBatches` for their order and for resuming.

    Blocks of neighbouring rows are read from all shards: reading stays nearly sequential.
    """

    def __init__(
        self,
        store: PairedActivations,
        batch_size: int,
        seed: int = 0,
        buffer_rows: int = 65_536,
        block_rows: int | None = None,
        drop_last: bool = False,
        on_nonfinite: OnNonFinite = "error",
    ):
        if min(batch_size, buffer_rows, 1 if block_rows is None else block_rows) < 1:
            raise ValueError(
                f"batch, buffer and block of {batch_size}, {buffer_rows}, {block_rows}; wanted 1 or more."
            )
        if on_nonfinite not in ("error", "skip"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r}; known: error, skip.")
        super().__init__(batch_size, seed, buffer_rows, drop_last)
        self.store, self.buffer_rows, self.block_rows = store, buffer_rows, block_rows
        self.on_nonfinite = on_nonfinite

    def __len__(self) -> int:
        """Batches in an epoch, if no row is skipped."""
        whole, rest = divmod(len(self.store), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def widths(self) -> tuple[int, ...]:
        return self.store.widths

    @cached_property
    def _blocks(self) -> list[Run]:
        """The rows of each block, (shard, start, stop)."""
        if self.block_rows is None and self.store.whole:
            return self.store.captured_together()
        rows = BLOCK_ROWS if self.block_rows is None else self.block_rows
        return [
            (shard, at, min(at + rows, stop))
            for shard, start, stop in self.store.runs
            for at in range(start, stop, rows)
        ]

    @property
    def _n_blocks(self) -> int:
        return len(self._blocks)

    @property
    def _rows_at_most(self) -> int:
        return self.store.manifest["candidates"] if self.store.whole else len(self.store)

    def _read(self, block: int) -> Float[Tensor, "batch model d_in"]:
        shard, start, stop = self._blocks[block]
        x = self.store.shards[shard].acts(start, stop)
        if x.sum(dtype=torch.float32).isfinite():
            return x
        finite = x.isfinite().all(dim=-1)
        whole = finite.all(dim=-1)
        if not whole.all():  # else the sum alone was too large
            self._judge(finite, shard, start)
        return x[whole]

    def _judge(self, finite: Bool[Tensor, "batch model"], shard: int, start: int) -> None:
        """Raise for the first row that is not finite, unless it may be skipped."""
        row, model = (~finite).nonzero()[0].tolist()
        self.skipped += int((~finite).any(dim=-1).sum())
        allowed = int(SKIPPED_AT_MOST * len(self.store))
        if self.on_nonfinite == "skip" and self.skipped <= allowed:
            return
        holder = self.store.shards[shard]
        sequence, position = (int(place) for place in holder.places(start + row, start + row + 1))
        name = holder.path.name if isinstance(holder, FileShard) else f"part {shard}"
        side = SIDES[model] if model < len(SIDES) else f"number {model}"
        remedy = (
            f"{self.skipped} rows are not finite and at most {allowed} of {len(self.store):,} may be skipped"
            if self.on_nonfinite == "skip"
            else "on_nonfinite='skip' leaves such rows out of both models"
        )
        raise NonFiniteActs(
            f"NaN or Inf in the {side} model at {self.store.manifest['hook']!r}: sequence {sequence} "
            f"({self.store.corpus.sources[sequence]}), position {position}, {name}.  Capture that "
            f"shard again (delete its file, and only it is made anew); {remedy}."
        )

    def _data(self) -> dict[str, Any]:
        manifest, asked, whole = self.store.manifest, self.store.manifest["asked"], self.store.whole
        together = self.block_rows is None and whole
        data = {
            "blocks": "captured together" if together else self.block_rows or BLOCK_ROWS,
            "models": fingerprints(manifest["pair"]),
            "corpus_sha256": manifest["corpus_sha256"],
            **{key: asked[key] for key in ("dtype", "drop", "max_tokens", "shard_tokens")},
        }
        if whole:
            return data
        runs = hashlib.sha256(str(self.store.runs).encode()).hexdigest()
        return data | {"rows": len(self.store), "runs_sha256": runs}
