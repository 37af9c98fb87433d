"""A shard: the activations of a run of sequences, in memory or in a safetensors file that is read block by block."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import StoredTensor, read_header, sha256, write_atomically
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.harvest import Harvested

TENSORS = ("acts", "sequence", "position")
STORED = {"float32": "F32", "bfloat16": "BF16"}


@runtime_checkable
class Shard(Protocol):
    """Rows of activations, with the sequence and the position that each row's token has in the corpus."""

    def __len__(self) -> int: ...
    def acts(self, start: int, stop: int) -> Float[Tensor, "batch model d_in"]: ...
    def places(self, start: int, stop: int) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]: ...


@dataclass(frozen=True, eq=False)
class MemoryShard:
    """A shard that was just harvested."""

    x: Float[Tensor, "batch model d_in"]
    sequence: Int[Tensor, "batch"]
    position: Int[Tensor, "batch"]
    dropped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.x)

    def acts(self, start: int, stop: int) -> Float[Tensor, "batch model d_in"]:
        return self.x[start:stop]

    def places(self, start: int, stop: int) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
        return self.sequence[start:stop], self.position[start:stop]

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {"acts": self.x, "sequence": self.sequence, "position": self.position}
        write_atomically(path, lambda temporary: save_file(tensors, temporary))


class FileShard:
    """A shard on disk, memory-mapped: only the blocks that are asked for are read."""

    def __init__(self, path: Path, rows: int):
        self.path, self.rows = path, rows

    def __len__(self) -> int:
        return self.rows

    def acts(self, start: int, stop: int) -> Float[Tensor, "batch model d_in"]:
        return self._file.get_slice("acts")[start:stop]

    def places(self, start: int, stop: int) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
        return self._file.get_slice("sequence")[start:stop], self._file.get_slice("position")[start:stop]

    @cached_property
    def _file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, framework="pt")


def check_shard(path: Path, rows: int, n_models: int, d_in: int, dtype: str, digest: str | None) -> None:
    """Raise CorruptFile unless the file is this shard; ``digest`` None leaves its contents unread."""
    remedy = (
        f"Delete {path.name} and run capture again with the same arguments: only this shard is made anew."
    )
    if not path.is_file():
        raise CorruptFile(f"{path} is missing.  {remedy}")
    try:
        found = read_header(path, TENSORS)
    except CorruptFile as error:
        raise CorruptFile(f"{error}  {remedy}") from error
    wanted = {
        "acts": StoredTensor(STORED[dtype], (rows, n_models, d_in)),
        "sequence": StoredTensor("I32", (rows,)),
        "position": StoredTensor("I32", (rows,)),
    }
    if found != wanted:
        raise CorruptFile(f"{path} holds {found['acts']}; the manifest says {wanted['acts']}.  {remedy}")
    if digest is not None and (actual := sha256(path)) != digest:
        raise CorruptFile(
            f"{path} was altered: its sha256 is {actual[:12]}, the manifest says {digest[:12]}.  {remedy}"
        )


def to_shard(parts: Iterable[Harvested], n_rows: int) -> MemoryShard:
    """The harvested parts joined on the CPU in memory for ``n_rows``, the most that can come."""
    acts, sequences, positions, dropped, held = None, [], [], Counter(), 0
    for part in parts:
        if acts is None:
            acts = torch.empty(n_rows, *part.x.shape[1:], dtype=part.x.dtype)
        acts[held : held + len(part.x)] = part.x
        held += len(part.x)
        sequences.append(part.sequence.int())
        positions.append(part.position.int())
        dropped += part.dropped
    assert acts is not None, "a shard has at least one sequence"
    return MemoryShard(acts[:held], torch.cat(sequences), torch.cat(positions), dropped)


def in_shards(corpus: Corpus, shard_tokens: int) -> list[Tensor]:
    """The sequences of each shard, neighbours in the length-sorted order: ``shard_tokens``, or one longer one."""
    order = corpus.order()
    shards, start, held = [], 0, 0
    for place, length in enumerate(corpus.lengths[order].tolist()):
        if held and held + length > shard_tokens:
            shards.append(order[start:place])
            start, held = place, 0
        held += length
    return [*shards, order[start:]]


def in_groups(corpus: Corpus, shard_tokens: int, max_tokens: int) -> list[list[Tensor]]:
    """For each shard the groups of sequences that go through the models together."""
    return [corpus.groups(sequences, max_tokens) for sequences in in_shards(corpus, shard_tokens)]
