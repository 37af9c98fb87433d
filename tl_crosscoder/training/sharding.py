"""One training on many processes: the axes of a Shard as process groups, and a crosscoder divided and put together again."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, L2Norm, Loss
from tl_crosscoder.dictionary.losses.delta import Delta
from tl_crosscoder.dictionary.losses.matryoshka import Matryoshka
from tl_crosscoder.dictionary.losses.pre_act import PreAct
from tl_crosscoder.dictionary.losses.tanh_penalty import TanhPenalty
from tl_crosscoder.dictionary.shard import WHOLE, Shard, by_latent
from tl_crosscoder.dictionary.sparsity import (
    BatchTopK,
    GroupMax,
    JumpReLU,
    PerModel,
    ReLU,
    Sparsity,
    Split,
    TopK,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: What takes into account that other ranks hold latents and read tokens.
SPARSITIES = (BatchTopK, TopK, GroupMax, ReLU, JumpReLU, Split, PerModel)
LOSSES = (MSE, L2Norm, L1, AuxK, Delta, Matryoshka, TanhPenalty, PreAct)
#: How long ranks wait for one that does not answer: longer than the first one takes to write a large checkpoint.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, as an axis of a Shard; their tensors travel by ``device``."""

    group: "ProcessGroup"
    device: torch.device

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def index(self) -> int:
        return self.group.rank()

    def add_(self, values: Tensor) -> Tensor:
        from torch import distributed

        if self.size == 1:
            return values
        moved = values.to(self.device).contiguous()
        distributed.all_reduce(moved, group=self.group)
        return values if moved is values else values.copy_(moved)

    def collected(self, values: Tensor) -> Iterator[Tensor]:
        from torch import distributed

        first = distributed.get_global_rank(self.group, 0)
        if self.index:
            distributed.send(values.to(self.device).contiguous(), first, self.group)
            return
        yield values
        for index in range(1, self.size):
            moved = torch.empty_like(values, device=self.device, memory_format=torch.contiguous_format)
            distributed.recv(moved, distributed.get_global_rank(self.group, index), self.group)
            yield moved


@contextmanager
def joined(data: int = 1, device: torch.device | str = "cpu") -> Iterator[Shard]:
    """The part of this process in the training of all processes that torchrun started, for as long as the block lasts.

    They form ``data`` rows: a row reads its part of each batch, and divides the latents among its processes.  On CPUs they talk by
    gloo; on GPUs by nccl, each process on the GPU of its local rank, which becomes the current one.  A process that torchrun did
    not start is alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if data < 1 or size % data:
        raise ValueError(
            f"{size} processes are no grid of data={data} rows; start a multiple of {data} (torchrun --nproc-per-node), "
            "or choose another data"
        )
    if size == 1:
        yield WHOLE
        return
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    here = _device(torch.device(device))
    distributed.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        mesh = init_device_mesh(here.type, (data, size // data), mesh_dim_names=("data", "latent"))
        groups = mesh.get_group("latent"), mesh.get_group("data"), distributed.group.WORLD
        yield Shard(*(Ranks(group, here) for group in groups if group is not None))
    finally:
        distributed.destroy_process_group()


def _device(asked: torch.device) -> torch.device:
    """The processor, or the GPU of this process."""
    if asked.type != "cuda":
        return asked
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if asked.index is not None or local >= there:
        raise ValueError(
            f"process {local} of this machine wants a GPU of its own: {there} are there, and device={str(asked)!r} was asked for; "
            "pass device='cuda' and start at most one process a GPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def check(crosscoder: Crosscoder, losses: Sequence[Loss]) -> None:
    """Raise ValueError for what would not be trained, by several ranks, as by one."""
    if crosscoder.shard.every.size == 1:
        return
    sparsities = [part for part in crosscoder.sparsity.modules() if isinstance(part, Sparsity)]
    for parts, known in (sparsities, SPARSITIES), (losses, LOSSES):
        for part in parts:
            if not isinstance(part, known):
                raise ValueError(
                    f"{type(part).__name__} is trained by one process only; by several: {', '.join(k.__name__ for k in known)}"
                )


@torch.no_grad()
def divide(crosscoder: Crosscoder, shard: Shard) -> None:
    """Leave of a crosscoder, the same on every rank, the latents of this one: what ``Crosscoder(..., shard=shard)`` makes at once.

    Raises ValueError, before anything changes, where latents do not divide evenly.
    """
    shard.n_held(crosscoder.d_sae)
    for weights in (crosscoder.W_enc_rows, crosscoder.W_dec, crosscoder.b_enc):
        weights.data = weights.data[shard.held].clone()
    crosscoder.sparsity.divide(shard)
    crosscoder.shard = shard


@torch.no_grad()
def agree(crosscoder: Crosscoder) -> None:
    """Give every rank the numbers of the first that should have the same."""
    shard = crosscoder.shard
    for name, tensor in crosscoder.state_dict(keep_vars=True).items():
        axis = shard.tokens if by_latent(name) else shard.every
        if axis.index:
            tensor.data.zero_()
        axis.add_(tensor.data)


@torch.no_grad()
def united(crosscoder: Crosscoder) -> Crosscoder | None:
    """The crosscoder with the latents of all ranks, on the CPU of the first rank; None on the others.  Alone, the same one."""
    if crosscoder.shard.every.size == 1:
        return crosscoder
    state = gathered(dict(crosscoder.state_dict()), crosscoder.shard)
    if not crosscoder.shard.is_first:
        return None
    with torch.device("meta"):
        whole = Crosscoder.from_config(crosscoder.config)
    whole.load_state_dict(state, assign=True)
    return whole.to("cpu").train(crosscoder.training)


def gathered(tree: Any, shard: Shard, path: str = "") -> Any:
    """The tree of all ranks' tensors, latents in their order and on the CPU, on the first rank; elsewhere of no use."""
    if shard.every.size == 1:
        return tree
    if isinstance(tree, dict):
        return {name: gathered(value, shard, f"{path}.{name}") for name, value in tree.items()}
    if not (isinstance(tree, Tensor) and tree.dim() and by_latent(path)) or shard.tokens.index:
        return tree
    n = shard.latents.size
    whole = tree.new_empty(n * len(tree) if shard.is_first else 0, *tree.shape[1:], device="cpu")
    for index, part in enumerate(shard.latents.collected(tree)):
        whole[index::n] = part.cpu()
    return whole
