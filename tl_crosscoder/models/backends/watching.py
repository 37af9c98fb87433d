"""Seeing what a model is about to read, however its owner runs it: a forward of his own, ``generate``, a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tl_crosscoder.models.tokens import TokenBatch

#: ``on_tokens(tokens, new)``: all tokens so far, of which the last ``new`` are about to be read.
OnTokens = Callable[[TokenBatch, int], None]


class Reading:
    """Tokens as they come: the new ones of each forward, joined to those that a key-value cache already holds."""

    def __init__(self, on_tokens: OnTokens):
        self.on_tokens = on_tokens
        self.ids: Tensor | None = None
        self.busy = False  # ``on_tokens`` may run the same modules

    def read(self, ids: Tensor, mask: Tensor | None, n_cached: int) -> None:
        """``mask`` is over cached and new tokens, or over the new ones alone; None: all are real."""
        if self.busy:
            return
        if n_cached:
            if self.ids is None or self.ids.shape != (len(ids), n_cached):
                had = "none of them" if self.ids is None else f"{list(self.ids.shape)}"
                raise RuntimeError(
                    f"the key-value cache holds [{len(ids)}, {n_cached}] tokens of which {had} were read inside; begin the text "
                    "inside pair.hooks, and drop the cache afterwards."
                )
            ids = torch.cat([self.ids.to(ids), ids], dim=1)
        self.ids = ids
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"pair.hooks reads masks [seq, pos], got one of {list(mask.shape)}; packed texts are not supported here."
            )
        if mask is not None and mask.shape[1] < ids.shape[1]:
            earlier = mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])
            mask = torch.cat([earlier, mask], dim=1)
        self.busy = True
        try:
            self.on_tokens(TokenBatch.from_ids(ids, mask), ids.shape[1] - n_cached)
        finally:
            self.busy = False

    def exchange(self, order: Tensor) -> None:
        """Row i goes on with the text that row ``order[i]`` had, as beam search decides between two steps."""
        if self.ids is not None:
            self.ids = self.ids[order.to(self.ids.device)]


@contextmanager
def watching_decoder(decoder: nn.Module, on_tokens: OnTokens) -> Iterator[None]:
    """Of transformers models: ``decoder`` is the module that holds the blocks, which every caller goes through."""
    reading = Reading(on_tokens)
    caches: list[Any] = []

    def follow(cache: Any) -> None:
        reorder = cache.reorder_cache

        def reordered(order: Tensor) -> None:
            reorder(order)
            reading.exchange(order)

        cache.reorder_cache = reordered
        caches.append(cache)

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("pair.hooks needs token ids: the model was given embeddings, or none.")
        cache = kwargs.get("past_key_values")
        if (
            hasattr(cache, "reorder_cache")
            and not reading.busy
            and all(cache is not known for known in caches)
        ):
            follow(cache)
        n_cached = 0 if cache is None else int(cache.get_seq_length())
        reading.read(ids, kwargs.get("attention_mask"), n_cached)

    handle = decoder.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for cache in caches:
            del cache.reorder_cache


@contextmanager
def watching_hooked_transformer(model: Any, on_tokens: OnTokens) -> Iterator[None]:
    """Of a HookedTransformer: ids where they are embedded, mask and cache where its first block gets them."""
    reading, latest = Reading(on_tokens), []

    def embedded(_module: nn.Module, args: tuple) -> None:
        if not reading.busy:
            latest[:] = [args[0]]

    def entered(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        entry = kwargs.get("past_kv_cache_entry")
        reading.read(
            latest[0], kwargs.get("attention_mask"), 0 if entry is None else entry.past_keys.shape[1]
        )

    handles = [
        model.embed.register_forward_pre_hook(embedded),
        model.blocks[0].register_forward_pre_hook(entered, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
