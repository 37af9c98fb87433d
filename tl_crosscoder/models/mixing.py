"""A stream of blocks in, random batches out: each row once, through one buffer of fixed size."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def mixed_batches(
    blocks: Iterable[Tensor],
    batch_size: int,
    buffer_rows: int,
    rng: np.random.Generator,
    drop_last: bool = False,
) -> Iterator[Float[Tensor, "batch model d_in"]]:
    """float32 batches of rows drawn from a full buffer; the buffer is emptied, then filled again.

    Rows too few for a batch wait for the next filling; at the very end they form a smaller batch, unless ``drop_last``.
    """
    buffer, held = None, 0
    for block in blocks:
        while len(block):
            if buffer is None:
                buffer = torch.empty(
                    max(buffer_rows, batch_size), *block.shape[1:], dtype=block.dtype, device=block.device
                )
            taken = block[: len(buffer) - held]
            buffer[held : held + len(taken)] = taken
            held, block = held + len(taken), block[len(taken) :]
            if held == len(buffer):
                order = torch.from_numpy(rng.permutation(held)).to(buffer.device)
                whole = held - held % batch_size
                yield from _float32(buffer, order[:whole], batch_size)
                waiting = buffer[order[whole:]]
                held = len(waiting)
                buffer[:held] = waiting
    if buffer is not None and held:
        order = torch.from_numpy(rng.permutation(held)).to(buffer.device)
        yield from _float32(buffer, order[: held - held % batch_size if drop_last else held], batch_size)


def _float32(buffer: Tensor, order: Tensor, batch_size: int) -> Iterator[Tensor]:
    for rows in order.split(batch_size) if len(order) else ():
        yield buffer[rows].float()
