"""Corpus: ragged token sequences, what is known of each token, and where each sequence came from."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from tl_crosscoder.errors import CorruptFile, EmptyData
from tl_crosscoder.files import read_header, write_atomically
from tl_crosscoder.models.chats import (
    ASSISTANT,
    PREAMBLE,
    SPECIAL,
    TEMPLATE,
    Marked,
    as_messages,
    tokenise_chats,
)
from tl_crosscoder.models.text_files import Rows, read_dataset, read_file
from tl_crosscoder.models.texts import CHAT_CONTEXTS, checked_context, enough, tokenise_texts
from tl_crosscoder.models.tokens import Side, TokenBatch

FLAGS = {"special": SPECIAL, "template": TEMPLATE, "assistant": ASSISTANT, "preamble": PREAMBLE}
TENSORS = {"ids": "I32", "offsets": "I64", "flags": "U8", "source": "I32", "source_names": "U8"}
Indices = Sequence[int] | np.ndarray | Tensor | range


class Corpus:
    """Sequence i is ``ids[offsets[i]:offsets[i + 1]]``; ``flags`` has a bit per entry of ``FLAGS``.

    ``sources`` names where each sequence came from.  Build one with :meth:`from_texts`, :meth:`from_chats`,
    :meth:`prompts`, :meth:`from_file` or :meth:`from_dataset`, and join them with ``+``.
    """

    def __init__(
        self,
        ids: Int[Tensor, "batch"],
        offsets: Int[Tensor, " _"],
        flags: Integer[Tensor, "batch"],
        sources: Sequence[str],
    ):
        self.ids, self.offsets, self.flags = (
            ids.to(torch.int32),
            offsets.to(torch.int64),
            flags.to(torch.uint8),
        )
        self.sources = tuple(sources)
        self.lengths = self.offsets.diff()
        if len(self.offsets) < 2 or len(ids) == 0:
            raise EmptyData("a corpus needs at least one token; these texts gave none.")
        if (
            len(self.sources) != len(self)
            or self.offsets[0] != 0
            or self.offsets[-1] != len(ids)
            or len(flags) != len(ids)
        ):
            raise ValueError(
                f"a corpus of {len(self)} sequences over {len(ids)} tokens wants a source for each sequence, a flag "
                f"for each token and offsets from 0 to {len(ids)}; got {len(self.sources)} sources, {len(flags)} "
                f"flags, offsets from {int(self.offsets[0])} to {int(self.offsets[-1])}."
            )
        if self.lengths.min() < 1:
            raise EmptyData(
                f"sequence {int(self.lengths.argmin())} of this corpus has no token; leave empty texts out."
            )

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        tokenizer: Any,
        *,
        context: int = 128,
        source: str = "text",
        windows: bool = True,
    ) -> "Corpus":
        """Documents laid end to end in windows of ``context`` tokens, each opened by BOS if there is one.

        ``windows=False`` gives one sequence per document instead, cut at ``context``.  A document that itself
        starts with BOS does not double it.
        """
        if isinstance(texts, str):
            raise TypeError("from_texts wants a list of documents, got one string; pass [text].")
        marked = tokenise_texts(texts, tokenizer, context=context, windows=windows)
        return cls.from_sequences(marked, source)

    @classmethod
    def from_chats(
        cls, chats: Iterable[Any], tokenizer: Any, *, context: int = 512, source: str = "chats"
    ) -> "Corpus":
        """Chats in the tokenizer's chat template, cut at ``context`` tokens.

        A chat is a list of ``{"role", "content"}`` or a mapping with ``messages``.  ``assistant`` follows the
        template's ``{% generation %}`` blocks, or else the assistant's messages and the token that ends the
        turn.  ``preamble`` marks the prefix that all these chats share.  Raises ValueError without a chat template.
        """
        limit = checked_context(context)
        marked = tokenise_chats(as_messages(chats), tokenizer)
        return cls.from_sequences([(ids[:limit], flags[:limit]) for ids, flags in marked], source)

    @classmethod
    def prompts(cls, questions: Iterable[Any], tokenizer: Any, *, source: str = "prompts") -> "Corpus":
        """Chats that end where the answer begins; a question is a user's text or a list of messages."""
        chats = [[{"role": "user", "content": q}] if isinstance(q, str) else q for q in questions]
        return cls.from_sequences(
            tokenise_chats(as_messages(chats), tokenizer, add_generation_prompt=True), source
        )

    @classmethod
    def from_file(
        cls, path: str | Path, tokenizer: Any, *, context: int = 128, source: str | None = None
    ) -> "Corpus":
        """``.txt`` with documents between blank lines, or ``.jsonl`` with ``messages`` or ``text`` rows.

        Chats are not cut into windows; they keep four contexts of tokens.
        """
        return cls._from_rows(read_file(path), tokenizer, context, source or Path(path).stem)

    @classmethod
    def from_dataset(
        cls,
        name: str,
        tokenizer: Any,
        *,
        split: str = "train",
        column: str | None = None,
        config: str | None = None,
        limit: int | None = None,
        max_tokens: int | None = None,
        context: int = 128,
        source: str | None = None,
    ) -> "Corpus":
        """Rows of a Hub dataset, or of a local folder that ``datasets`` can read.

        At most ``limit`` rows are read, and none after there is text for ``max_tokens``, of which the first ones are taken.
        ``config`` is the dataset's configuration.  The source is ``NAME[@CONFIG]:SPLIT[:COLUMN]``.
        """
        parts = read_dataset(name, split, column, limit, config)
        rows = enough(parts, max_tokens, tokenizer, context)
        told = (Path(name).name if Path(name).exists() else name) + (f"@{config}" if config else "")
        source = source or ":".join(filter(None, (told, split, column)))
        corpus = cls._from_rows(rows, tokenizer, context, source)
        return corpus if max_tokens is None else corpus.take(max_tokens)

    @classmethod
    def from_batch(cls, batch: TokenBatch, source: str = "batch") -> "Corpus":
        """The real tokens of a padded batch, one sequence a row."""
        batch = batch.to("cpu")
        bits = torch.stack([getattr(batch, name) * bit for name, bit in FLAGS.items()]).sum(dim=0)
        rows = zip(batch.ids, bits, batch.attention_mask, strict=True)
        return cls.from_sequences(
            [(ids[real].numpy(), flags[real].numpy()) for ids, flags, real in rows], source
        )

    @classmethod
    def from_sequences(cls, marked: Sequence[Marked], source: str) -> "Corpus":
        """Arrays of ids and flag bits, all of one source."""
        if not marked:
            raise EmptyData(f"the source {source!r} gave no tokens; check that the texts are not empty.")
        offsets = np.cumsum([0, *(len(ids) for ids, _ in marked)])
        ids = np.concatenate([ids for ids, _ in marked]).astype(np.int32)
        flags = np.concatenate([flags for _, flags in marked]).astype(np.uint8)
        return cls(
            torch.from_numpy(ids), torch.from_numpy(offsets), torch.from_numpy(flags), [source] * len(marked)
        )

    @classmethod
    def _from_rows(cls, rows: Rows, tokenizer: Any, context: int, source: str) -> "Corpus":
        parts = []
        if rows.texts:
            parts.append(cls.from_texts(rows.texts, tokenizer, context=context, source=source))
        if rows.chats:
            parts.append(
                cls.from_chats(rows.chats, tokenizer, context=CHAT_CONTEXTS * context, source=source)
            )
        if not parts:
            raise EmptyData(f"{source!r} holds no text and no chats.")
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def __add__(self, other: "Corpus") -> "Corpus":
        offsets = torch.cat([self.offsets, other.offsets[1:] + self.n_tokens])
        ids, flags = torch.cat([self.ids, other.ids]), torch.cat([self.flags, other.flags])
        return Corpus(ids, offsets, flags, self.sources + other.sources)

    def ids_of(self, sequence: int) -> Int[Tensor, "pos"]:
        return self.ids[self._place(sequence)]

    def flags_of(self, sequence: int) -> dict[str, Bool[Tensor, "pos"]]:
        """special, template, assistant and preamble of each token of one sequence."""
        bits = self.flags[self._place(sequence)]
        return {name: (bits & bit) > 0 for name, bit in FLAGS.items()}

    def marked(self, sequence: int) -> Marked:
        """Ids and flag bits of one sequence as arrays, as :meth:`from_sequences` takes them."""
        return self.ids[self._place(sequence)].numpy(), self.flags[self._place(sequence)].numpy()

    def token_flags(self) -> dict[str, Bool[Tensor, "batch"]]:
        """The same for all tokens of the corpus, one sequence after the other."""
        return {name: (self.flags & bit) > 0 for name, bit in FLAGS.items()}

    def token_numbers(self, sequences: Int[Tensor, "seq"]) -> Int[Tensor, "batch"]:
        """Where in the whole corpus each token of these sequences stands."""
        lengths = self.lengths[sequences]
        behind = lengths.cumsum(0) - lengths
        return torch.arange(int(lengths.sum())) + (self.offsets[sequences] - behind).repeat_interleave(
            lengths
        )

    def batch(self, indices: Indices, pad: Side = "right") -> TokenBatch:
        """The chosen sequences, padded (with id 0, masked) to the longest of them."""
        chosen = torch.as_tensor(np.asarray(indices), dtype=torch.long)
        if len(chosen) == 0:
            raise EmptyData("a batch needs at least one sequence; the indices are empty.")
        lengths = self.lengths[chosen]
        column = torch.arange(int(lengths.max())).expand(len(chosen), -1)
        if pad == "left":
            column = column - (lengths.max() - lengths)[:, None]
        mask = (column >= 0) & (column < lengths[:, None])
        place = (self.offsets[chosen][:, None] + column).masked_fill(~mask, 0)
        bits = self.flags[place].masked_fill(~mask, 0)
        flags = {name: (bits & bit) > 0 for name, bit in FLAGS.items()}
        return TokenBatch(self.ids[place].long().masked_fill(~mask, 0), mask, **flags)

    def batches(self, max_tokens: int = 4096) -> Iterator[tuple[Int[Tensor, "seq"], TokenBatch]]:
        """(numbers, batch), longest first, every sequence once, ``max_tokens`` a batch with padding."""
        for indices in self.groups(self.order(), max_tokens):
            yield indices, self.batch(indices)

    def order(self) -> Int[Tensor, "seq"]:
        """All sequences, longest first: a batch too large for memory fails at once."""
        return self.lengths.argsort(descending=True, stable=True)

    def groups(self, order: Int[Tensor, "seq"], max_tokens: int) -> list[Tensor]:
        """A length-sorted order in batches of ``max_tokens`` with padding, or of one longer sequence."""
        groups, at = [], 0
        while at < len(order):
            count = max(1, max_tokens // int(self.lengths[order[at]]))
            groups.append(order[at : at + count])
            at += count
        return groups

    def select(self, indices: Indices) -> "Corpus":
        """The chosen sequences in the chosen order."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        numbers = self.token_numbers(chosen)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths[chosen].cumsum(0)])
        return Corpus(
            self.ids[numbers], offsets, self.flags[numbers], [self.sources[i] for i in chosen.tolist()]
        )

    def conversations(self) -> Int[Tensor, "seq"]:
        """A group number for each sequence, counting up from 0: answers to one prompt are one group, however often it is asked.

        Sequences with an assistant's words are told apart by the ids before the first of them, all others by all their ids.
        What is estimated on one side of a split, or resampled, is independent of the rest only by whole groups.
        """
        ids, starts = self.ids.numpy(), self.offsets.tolist()
        spoken = np.flatnonzero((self.flags & ASSISTANT).numpy())
        first = np.append(spoken, len(ids))[np.searchsorted(spoken, starts[:-1])]
        numbers: dict[bytes, int] = {}
        groups = []
        for start, stop, answer in zip(starts, starts[1:], first.tolist(), strict=False):
            prompt = ids[start : answer if start < answer < stop else stop]
            groups.append(numbers.setdefault(prompt.tobytes(), len(numbers)))
        return torch.tensor(groups)

    def split(self, fraction: float, seed: int = 0) -> tuple["Corpus", "Corpus"]:
        """Two corpora that share no sequence and no conversation; the first holds about ``fraction`` of the sequences.

        Raises EmptyData where all sequences are one conversation.
        """
        left, right = split_groups(self.conversations().numpy(), fraction, seed)
        return self.select(left), self.select(right)

    def take(self, n_tokens: int, seed: int | None = None) -> "Corpus":
        """At least one whole sequence, with ``n_tokens`` in all at most: the first ones, or random ones."""
        order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))
        count = int(np.searchsorted(self.lengths.numpy()[order].cumsum(), n_tokens, side="right"))
        return self.select(np.sort(order[: max(1, count)]))

    @cached_property
    def sha256(self) -> str:
        """Hash of ids, boundaries, flags and sources: equal hashes, equal activations."""
        digest = hashlib.sha256()
        for tensor in (self.ids, self.offsets, self.flags):
            digest.update(tensor.numpy().tobytes())
        digest.update(json.dumps(self.sources).encode())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """One safetensors file, written whole or not at all."""
        from safetensors.torch import save_file

        names = {name: number for number, name in enumerate(dict.fromkeys(self.sources))}
        tensors = {
            "ids": self.ids,
            "offsets": self.offsets,
            "flags": self.flags,
            "source": torch.tensor([names[source] for source in self.sources], dtype=torch.int32),
            "source_names": torch.tensor(list(json.dumps(list(names)).encode()), dtype=torch.uint8),
        }
        metadata = {"corpus": json.dumps({"format_version": 1})}
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Corpus":
        """The corpus that :meth:`save` wrote; CorruptFile for anything else."""
        from safetensors.torch import load_file

        stored = read_header(Path(path), TENSORS)
        if found := [name for name, dtype in TENSORS.items() if stored[name].dtype != dtype]:
            raise CorruptFile(f"{path} is no corpus: {found[0]} is stored as {stored[found[0]]}.")
        tensors = load_file(path)
        try:
            names = json.loads(bytes(tensors["source_names"].tolist()))
            sources = [str(names[number]) for number in tensors["source"].tolist()]
            return cls(tensors["ids"], tensors["offsets"], tensors["flags"], sources)
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            raise CorruptFile(f"{path} is no corpus: {error}") from error

    def _place(self, sequence: int) -> slice:
        return slice(int(self.offsets[sequence]), int(self.offsets[sequence + 1]))

    def __repr__(self) -> str:
        sources = ", ".join(dict.fromkeys(self.sources))
        return f"Corpus({len(self):,} sequences, {self.n_tokens:,} tokens, {sources})"


def split_groups(groups: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of both sides of a split by whole groups, the first side as near ``fraction`` of all places as a prefix can be."""
    members, sizes = np.unique(groups, return_counts=True)
    if not 0 < fraction < 1:
        raise EmptyData(f"splitting at {fraction} leaves one side empty; wanted a share above 0 and below 1.")
    if len(members) < 2:
        raise EmptyData(
            f"the {len(groups)} sequences are {len(members)} conversation, which one side of a split must hold "
            "whole; add texts, or answers to another prompt."
        )
    order = np.random.default_rng(seed).permutation(len(members))
    counts = sizes[order].cumsum()[:-1]  # at least one group is left for the other side
    taken = order[: 1 + int(np.abs(counts - fraction * len(groups)).argmin())]
    first = np.isin(groups, members[taken])
    return np.flatnonzero(first), np.flatnonzero(~first)
