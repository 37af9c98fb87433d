"""The decoding loop that every backend shares; a backend brings only its step."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.models.backends.base import BeforeForward
from tl_crosscoder.models.tokens import TokenBatch

#: ``step(tokens, new)``: logits [seq, d_vocab] of the last position, from all tokens so far, of which the last
#: ``new`` were not fed before.
Step = Callable[[TokenBatch, int], Tensor]


@torch.no_grad()
def decode(
    step: Step,
    batch: TokenBatch,
    max_new_tokens: int,
    *,
    stop_ids: frozenset[int],
    pad_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    before_forward: BeforeForward | None = None,
) -> Int[Tensor, "seq new"]:
    """New ids, until every row has produced a stop id or ``max_new_tokens`` are there.

    ``pad_id`` follows a row's stop id.  Sampling draws on the CPU from ``seed``, so that a seed means the same on every device.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
    tokens, generator = batch.padded("left"), torch.Generator().manual_seed(seed)
    ended = torch.zeros(len(tokens.ids), dtype=torch.bool, device=tokens.ids.device)
    stops = torch.tensor(sorted(stop_ids), dtype=tokens.ids.dtype, device=tokens.ids.device)
    chosen: list[Tensor] = []
    new = tokens.ids.shape[1]
    for count in range(max_new_tokens):
        if before_forward is not None:
            before_forward(tokens.ids[:, -new:], count)
        ids = pick(step(tokens, new), temperature, generator).to(tokens.ids)
        ids = torch.where(ended, pad_id, ids)
        chosen.append(ids)
        ended = ended | torch.isin(ids, stops)
        if ended.all():
            break
        tokens, new = extended(tokens, ids[:, None]), 1
    return torch.stack(chosen, dim=1)


def pick(
    logits: Float[Tensor, "seq d_vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, "seq"]:
    """The likeliest token of each row at temperature 0, a draw above it."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def extended(tokens: TokenBatch, ids: Int[Tensor, "seq new"]) -> TokenBatch:
    """The batch with ``ids`` appended as real tokens."""
    mask = torch.cat([tokens.attention_mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    return TokenBatch.from_ids(torch.cat([tokens.ids, ids], dim=1), mask)


def last_only(model: Any) -> dict[str, Any]:
    """What asks a transformers model for the last position's logits only, where its forward can."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


def stop_and_pad(model: Any, tokenizer: Any, stop_ids: Iterable[int] | None) -> tuple[frozenset[int], int]:
    """What ends a row and what fills it afterwards, from the tokenizer and the model's configs."""
    sources = [tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)]
    ends = frozenset(
        end
        for source in sources
        for end in _as_tuple(getattr(source, "eos_token_id", None))
        if stop_ids is None
    )
    stops = ends if stop_ids is None else frozenset(stop_ids)
    pads = [pad for source in sources for pad in _as_tuple(getattr(source, "pad_token_id", None))]
    return stops, next(iter([*pads, *sorted(stops), 0]))


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
