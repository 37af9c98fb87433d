"""The products of a sparse dictionary on active (token, latent) pairs only, forwards and backwards.

A pair is read as a row of ``x`` (its token) and a row of weights (its latent): memory and time follow the pairs, not d_sae.  What
is summed for each token is gathered in token order; what is summed for each latent, and every dot product, in latent order, so
that each row of weights is read once.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Bool, Float, Int
from torch import Tensor

#: Elements gathered at once where torch has no sampled product: 64 MiB of float32 for each of the two operands.
CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Pairs:
    """Active (token, latent) pairs in token order: token i owns ``offsets[i]:offsets[i + 1]``."""

    tokens: Int[Tensor, "nnz"]
    latents: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "_"]
    d_sae: int

    @classmethod
    def of_latent_order(
        cls, tokens: Int[Tensor, "nnz"], latents: Int[Tensor, "nnz"], n_tokens: int, d_sae: int
    ) -> tuple["Pairs", Int[Tensor, "nnz"]]:
        """The pairs that came sorted by latent, then token; and where each of them, in token order, came from."""
        order = sorting_order(tokens, n_tokens)
        pairs = cls(tokens[order], latents[order], starts(tokens, n_tokens), d_sae)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        vars(pairs)["by_latent"] = (back, starts(latents, d_sae))
        return pairs, order

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "_"]]:
        """The order that sorts the pairs by latent, and where each latent starts in it."""
        return sorting_order(self.latents, self.d_sae), starts(self.latents, self.d_sae)


def sorting_order(groups: Int[Tensor, "nnz"], n: int) -> Int[Tensor, "nnz"]:
    """The stable order that sorts group numbers below ``n`` (numpy sorts 16-bit numbers by radix, many times faster)."""
    if groups.device.type == "cpu" and n <= 1 << 16:
        return torch.from_numpy(groups.numpy().astype(np.uint16).argsort(kind="stable"))
    return groups.argsort(stable=True)


def starts(groups: Int[Tensor, "nnz"], n: int) -> Int[Tensor, "_"]:
    """Where each of ``n`` groups starts in a sorted list of group numbers, and the end."""
    offsets = groups.new_zeros(n + 1)
    torch.cumsum(torch.bincount(groups, minlength=n), 0, out=offsets[1:])
    return offsets


def flat_nonzero(mask: Bool[Tensor, "*shape"]) -> Int[Tensor, "nnz"]:
    """The flat positions of True, ascending (numpy's search is several times faster than torch's on a CPU)."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def flat_positive(x: BFloat16[Tensor, "*shape"]) -> Int[Tensor, "nnz"]:
    """The flat positions of numbers above 0, ascending: those whose sixteen bits are above 0 as a whole number."""
    bits = x.view(torch.int16)
    if x.device.type == "cpu":  # numpy compares sixteen-bit numbers four times faster
        return torch.from_numpy(np.flatnonzero(bits.numpy() > 0))
    return flat_nonzero(bits > 0)


def encode_pairs(
    x: Float[Tensor, "batch *rest"],
    rows: Float[Tensor, "d_sae *rest"],
    bias: Float[Tensor, "d_sae"],
    pairs: Pairs,
    values: Float[Tensor, "nnz"] | None = None,
) -> Float[Tensor, "nnz"]:
    """``⟨x[token], rows[latent]⟩ + bias[latent]`` of each pair; ``values`` are these numbers where they are known already."""
    return _Encode.apply(x.flatten(1), rows, bias, pairs, values)


def decode_pairs(
    values: Float[Tensor, "nnz"], rows: Float[Tensor, "d_sae *rest"], pairs: Pairs
) -> Float[Tensor, "batch *rest"]:
    """``Σ values · rows[latents]`` for each token: ``acts @ rows``."""
    return _Decode.apply(values.to(rows.dtype), rows, pairs).unflatten(1, rows.shape[1:])


def take_rows(
    rows: Float[Tensor, "d_sae *rest"], latents: Int[Tensor, "latent"]
) -> Float[Tensor, "latent *rest"]:
    """``rows[latents]``, latents ascending, with a gradient for these rows only."""
    return _Take.apply(rows, latents)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, bias: Tensor, pairs: Pairs, values: Tensor | None
    ) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(x, rows)
        return _dots(x, rows.flatten(1), pairs) + bias[pairs.latents] if values is None else values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, rows) = grads, ctx.saved_tensors
        d_x = _sum_by_token(grad, rows.flatten(1), ctx.pairs) if ctx.needs_input_grad[0] else None
        d_rows = _pair_gradient(grad, x, ctx.pairs, rows) if ctx.needs_input_grad[1] else None
        order, offsets = ctx.pairs.by_latent
        d_bias = torch.segment_reduce(grad[order], "sum", offsets=offsets)
        return d_x, d_rows, d_bias, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(values, rows)
        return _sum_by_token(values, rows.flatten(1), pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (values, rows) = grads[0].contiguous(), ctx.saved_tensors
        d_values = _dots(grad, rows.flatten(1), ctx.pairs) if ctx.needs_input_grad[0] else None
        d_rows = _pair_gradient(values, grad, ctx.pairs, rows) if ctx.needs_input_grad[1] else None
        return d_values, d_rows, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, latents: Tensor) -> Tensor:
        ctx.save_for_backward(rows, latents)
        return rows.index_select(0, latents)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, latents = ctx.saved_tensors
        if (apart := getattr(rows, "row_grads", None)) is not None:
            apart.add_rows(latents, grads[0].flatten(1))
            return None, None
        return torch.zeros_like(rows).index_add_(0, latents, grads[0]), None


def _pair_gradient(weights: Tensor, x: Tensor, pairs: Pairs, rows: Tensor) -> Tensor | None:
    """The gradient of the rows; None where it goes to their collector (:func:`row_grads.kept_apart`)."""
    if (apart := getattr(rows, "row_grads", None)) is None:
        return _sum_by_latent(weights, x, pairs).view_as(rows)
    apart.add_pairs(weights, x, pairs)
    return None


def _sum_by_token(values: Tensor, rows: Tensor, pairs: Pairs) -> Tensor:
    return bag(pairs.latents, rows, pairs.offsets, values)


def _sum_by_latent(values: Tensor, x: Tensor, pairs: Pairs) -> Tensor:
    order, offsets = pairs.by_latent
    return bag(pairs.tokens[order], x, offsets, values[order])


def bag(
    index: Int[Tensor, "nnz"],
    rows: Float[Tensor, "m n"],
    offsets: Int[Tensor, "_"],
    weights: Float[Tensor, "nnz"],
) -> Float[Tensor, "group n"]:
    """``Σ weights · rows[index]`` over each group's part of the list."""
    return _BAG.get()(index, rows, offsets, weights)


def torch_bag(index: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """:func:`bag` by torch."""
    return F.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


_BAG: ContextVar[Callable[..., Tensor]] = ContextVar("bag", default=torch_bag)


@contextmanager
def summed_by(other: Callable[..., Tensor]) -> Iterator[None]:
    """Within the block, and in this thread, :func:`bag` is what another function of the same arguments gives."""
    before = _BAG.set(other)
    try:
        yield
    finally:
        _BAG.reset(before)


def _dots(x: Tensor, rows: Tensor, pairs: Pairs) -> Tensor:
    """``⟨x[token], rows[latent]⟩`` of each pair."""
    order, offsets = pairs.by_latent
    found = torch.empty(len(order), dtype=x.dtype, device=x.device)
    found[order] = dots_by_latent(x, rows, pairs.tokens[order], offsets)
    return found


def dots_by_latent(
    x: Float[Tensor, "batch n"],
    rows: Float[Tensor, "latent n"],
    tokens: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "_"],
) -> Float[Tensor, "nnz"]:
    """``⟨x[token], rows[latent]⟩`` of pairs in latent order; latent j owns ``tokens[offsets[j] : offsets[j + 1]]``."""
    if x.dtype in (torch.float32, torch.float64):
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Sparse", category=UserWarning
            )  # torch calls its CSR support beta
            zeros, shape = x.new_zeros(len(tokens)), (len(rows), len(x))
            at = torch.sparse_csr_tensor(offsets, tokens, zeros, shape, check_invariants=False)
            return torch.sparse.sampled_addmm(at, rows, x.T, beta=0.0).values()
    size = max(1, CHUNK // x.shape[1])
    latents = torch.repeat_interleave(offsets.diff(), output_size=len(tokens))
    split = zip(tokens.split(size), latents.split(size), strict=True)
    return torch.cat([(x[t] * rows[j]).sum(-1) for t, j in split])
