"""nnsight models: ``NNsight`` around any transformers model, and ``TransformersModel``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.models.backends.base import BeforeForward, apply_edit, evaluating
from tl_crosscoder.models.backends.generation import decode, last_only, stop_and_pad
from tl_crosscoder.models.backends.hooks import HookBackend
from tl_crosscoder.models.backends.sites import Site, decoder_layers, edits_in_order, parse_hook
from tl_crosscoder.models.backends.watching import OnTokens
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.types import Edit


class NNsightBackend:
    """A transformers model traced by nnsight.

    Do not hang torch hooks on the same model: nnsight reads a block's output as it was before them.
    """

    def __init__(self, model: Any, tokenizer: Any = None, layers: str | None = None):
        self.model = model
        own = vars(model).get("tokenizer")
        self.tokenizer = tokenizer if own is None else own
        path, blocks = decoder_layers(self.module, layers)
        self.n_layers = len(blocks)
        self._plain = HookBackend(self.module, self.tokenizer, layers)
        self._blocks = model
        for part in path.split("."):
            self._blocks = getattr(self._blocks, part)

    @property
    def module(self) -> Any:
        """The torch module that holds the weights."""
        return self.model._module

    @property
    def d_in(self) -> int:
        return self.module.config.get_text_config().hidden_size

    @property
    def d_vocab(self) -> int:
        """Rows of the embedding, at least the tokenizer's length."""
        return self.module.get_input_embeddings().num_embeddings

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.module.get_input_embeddings().weight.device

    def capture(self, batch: TokenBatch, hook: str) -> Float[Tensor, "seq pos d_in"]:
        """The residual stream at ``hook``; no later layer runs."""
        site = parse_hook(hook, self.n_layers)
        block = self._blocks[site.layer]
        inputs = self._inputs(batch, batch.ids.shape[1], None)
        with torch.no_grad(), evaluating(self.module), self.model.trace(**inputs) as tracer:
            acts = _read(block, site).save()
            tracer.stop()
        return acts

    def run(self, batch: TokenBatch, edits: Mapping[str, Edit] = {}) -> Float[Tensor, "seq pos d_vocab"]:
        """Logits, with each edit applied at its hook."""
        return self._logits(batch, batch.ids.shape[1], None, edits_in_order(edits, self.n_layers))

    def generate(
        self,
        batch: TokenBatch,
        max_new_tokens: int,
        edits: Mapping[str, Edit] = {},
        *,
        temperature: float = 0.0,
        seed: int = 0,
        before_forward: BeforeForward | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> Int[Tensor, "seq new"]:
        """New token ids, one trace a token over a key-value cache.

        Edits see the left-padded prompt, then each new token.
        """
        from transformers import DynamicCache

        cache, only = DynamicCache(config=self.module.config), last_only(self.module)
        ordered = edits_in_order(edits, self.n_layers)

        def step(tokens: TokenBatch, new: int) -> Tensor:
            return self._logits(tokens, new, cache, ordered, **only)[:, -1]

        stops, pad = stop_and_pad(self.module, self.tokenizer, stop_ids)
        return decode(
            step,
            batch.to(self.device),
            max_new_tokens,
            stop_ids=stops,
            pad_id=pad,
            temperature=temperature,
            seed=seed,
            before_forward=before_forward,
        )

    @contextmanager
    def attached(self, edits: Mapping[str, Edit], on_tokens: OnTokens) -> Iterator[None]:
        """Inside, every forward and every trace tells first what it will read, and has the edits applied.

        The edits are torch hooks: inside a trace the logits have them, while a block's ``.output`` reads as it was before.
        """
        with self._plain.attached(edits, on_tokens):
            yield

    def run_with_cache(
        self, batch: TokenBatch, wanted: Callable[[str], bool] | None
    ) -> tuple[Float[Tensor, "seq pos d_vocab"], dict[str, Tensor]]:
        """Logits, and the residual stream before and after each block, by TransformerLens' names."""
        return self._plain.run_with_cache(batch, wanted)

    def _logits(
        self, tokens: TokenBatch, new: int, cache: Any, edits: list[tuple[Site, Any]], **kwargs: Any
    ) -> Tensor:
        inputs = self._inputs(tokens, new, cache) | kwargs
        blocks = self._blocks
        with torch.no_grad(), evaluating(self.module), self.model.trace(**inputs):
            for site, edit in edits:
                _edit(blocks[site.layer], site, edit)
            output = self.model.output.logits.save()
        return output  # noqa: RET504  (a trace cannot be returned from)

    def _inputs(self, tokens: TokenBatch, new: int, cache: Any) -> dict[str, Any]:
        tokens = tokens.to(self.device)
        return {
            "input_ids": tokens.ids[:, -new:],
            "attention_mask": tokens.attention_mask.long(),
            "position_ids": tokens.position_ids[:, -new:],
            "past_key_values": cache,
            "use_cache": cache is not None,
        }


def _read(block: Any, site: Site) -> Any:
    """The activations at a site, inside a trace."""
    if site.point == "pre":
        return block.input
    output = (
        block.output
    )  # a tensor, or a tuple that starts with it; ``output[0]`` of a tensor is its first text
    return output[0] if isinstance(output, tuple) else output


def _edit(block: Any, site: Site, edit: Any) -> None:
    """The site's activations replaced, inside a trace: assigned anew, never changed in place."""
    if site.point == "pre":
        block.input = apply_edit(edit, block.input)
        return
    output = block.output
    if isinstance(output, tuple):
        block.output = (apply_edit(edit, output[0]), *output[1:])
    else:
        block.output = apply_edit(edit, output)
