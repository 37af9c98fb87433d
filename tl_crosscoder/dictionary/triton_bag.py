"""Sums of weighted rows as a Triton kernel: :func:`tl_crosscoder.dictionary.sparse_ops.bag`, which it is held to.

Imported where it was asked for and nowhere else.  A group's rows are added one after the other, so the same numbers give the same
bytes.
"""

from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports] - no dependency
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

#: Numbers of a row that one program sums.
TILE = 1024
DTYPES = (torch.float32, torch.float64)


@triton.jit
@no_type_check
def gathered(index, rows, stride, start, stop, weights, columns, mask):
    """``Σ weights · rows[index]`` over the list from ``start`` to ``stop``, at a tile of ``columns``."""
    total = tl.zeros(columns.shape, rows.dtype.element_ty)
    for i in range(start, stop):
        row = rows + tl.load(index + i) * stride
        total += tl.load(weights + i) * tl.load(row + columns, mask, 0.0)
    return total


@triton.jit
@no_type_check
def bag_kernel(out, index, rows, stride, offsets, weights, n, TILE: tl.constexpr):
    """One tile of one group's sum."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    total = gathered(index, rows, stride, start, stop, weights, columns, columns < n)
    tl.store(out + group * n + columns, total, columns < n)


def bag(
    index: Int[Tensor, "nnz"],
    rows: Float[Tensor, "m n"],
    offsets: Int[Tensor, "_"],
    weights: Float[Tensor, "nnz"],
) -> Float[Tensor, "group n"]:
    """``Σ weights · rows[index]`` over each group's part of the list."""
    groups, n = len(offsets) - 1, rows.shape[1]
    rows, out = rows if rows.stride(1) == 1 else rows.contiguous(), rows.new_empty(groups, n)
    if out.numel():
        grid = groups, triton.cdiv(n, TILE)
        lists = index.contiguous(), rows, rows.stride(0), offsets, weights.contiguous()
        launch(bag_kernel, grid, out, *lists, n, TILE)
    return out


def launch(kernel: Any, grid: tuple[int, int], first: Tensor, *arguments: Any) -> None:
    """Run a kernel on the device of its first argument.

    Every operation rounds (none is fused into another), so that tied numbers stay equal wherever they lie in a tile.
    """
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, enable_fp_fusion=False)


def check(weights: Tensor) -> None:
    """Raise ValueError for weights that the kernels cannot work on, with what can be done."""
    interpreted = not isinstance(bag_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: on any device, slowly
    wanted = (
        (interpreted or weights.is_cuda, "on a GPU (cuda)", weights.device, "crosscoder.to('cuda')"),
        (weights.dtype in DTYPES, "in float32 or float64", weights.dtype, "crosscoder.float()"),
        (weights.is_contiguous(), "contiguous", f"strides {weights.stride()}", "weights.data.contiguous()"),
    )
    for fits, want, got, remedy in wanted:
        if not fits:
            raise ValueError(
                f"kernels='triton' wants weights {want}, got {got}; take {remedy}, or kernels='torch'"
            )
