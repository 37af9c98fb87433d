"""Plain torch hooks on a transformers model: the reference every other backend is held to."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_crosscoder.models.backends.base import BeforeForward, Stop, apply_edit, evaluating
from tl_crosscoder.models.backends.generation import decode, last_only, stop_and_pad
from tl_crosscoder.models.backends.sites import Site, decoder_layers, edits_in_order, parse_hook
from tl_crosscoder.models.backends.watching import OnTokens, watching_decoder
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.types import Edit


class HookBackend:
    """A transformers or PEFT model read through torch hooks.

    ``layers`` is the path of the decoder blocks where the usual places do not hold them.  ``adapter="off"``
    sees a PEFT model as its base, through ``disable_adapter()``: two backends over one model are a pair in the
    memory of one.  ``adapter="merged"`` is a note that the weights contain a merged adapter.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        layers: str | None = None,
        adapter: Literal["on", "off", "merged"] = "on",
    ):
        if adapter == "off" and not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"adapter='off' wants a PEFT model, got {type(model).__name__}, which has no adapter"
            )
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        path, self.layers = decoder_layers(model, layers)
        self.decoder: nn.Module = model.get_submodule(path.rpartition(".")[0])

    @property
    def module(self) -> nn.Module:
        """The torch module that holds the weights."""
        return self.model

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def d_in(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def d_vocab(self) -> int:
        """Rows of the embedding, at least the tokenizer's length."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def dtype(self) -> torch.dtype:
        return next(self.layers.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def capture(self, batch: TokenBatch, hook: str) -> Float[Tensor, "seq pos d_in"]:
        """The residual stream at ``hook``; no later layer runs."""
        return self.capture_step(batch, batch.ids.shape[1], parse_hook(hook, self.n_layers), None)

    @torch.no_grad()
    def run(self, batch: TokenBatch, edits: Mapping[str, Edit] = {}) -> Float[Tensor, "seq pos d_vocab"]:
        """Logits, with each edit applied at its hook."""
        with self.edited(edits):
            return self._forward(batch, batch.ids.shape[1], None).logits

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
        """New token ids through the model's own key-value cache.

        Edits see the left-padded prompt, then each new token.
        """
        cache, only = self.new_cache(), last_only(self.model)

        def step(tokens: TokenBatch, new: int) -> Tensor:
            # The hooks live for one forward only: ``before_forward`` may run the same modules unedited.
            with self.edited(edits):
                return self._forward(tokens, new, cache, **only).logits[:, -1]

        stops, pad = stop_and_pad(self.model, self.tokenizer, stop_ids)
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

    def new_cache(self) -> Any:
        """An empty key-value cache of the kind this model uses."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def capture_step(
        self, tokens: TokenBatch, new: int, site: Site, cache: Any
    ) -> Float[Tensor, "seq new d_in"]:
        """The residual stream at the last ``new`` positions, the earlier ones being in ``cache``."""
        seen: list[Tensor] = []

        def stop(acts: Tensor) -> Tensor:
            seen.append(acts)
            raise Stop

        with self._hooked([(site, stop)]):
            try:
                self._forward(tokens, new, cache)
            except Stop:
                return seen[0]
        raise RuntimeError(f"{type(self.model).__name__} ran to its end without passing {site.name!r}")

    @contextmanager
    def attached(self, edits: Mapping[str, Edit], on_tokens: OnTokens) -> Iterator[None]:
        """Inside, every forward of the model tells first what it will read, and has the edits applied."""
        with watching_decoder(self.decoder, on_tokens), self.edited(edits):
            yield

    def run_with_cache(
        self, batch: TokenBatch, wanted: Callable[[str], bool] | None
    ) -> tuple[Float[Tensor, "seq pos d_vocab"], dict[str, Tensor]]:
        """Logits, and the residual stream before and after each block, by TransformerLens' names."""
        cache: dict[str, Tensor] = {}

        def keep(site: Site) -> Callable[[Tensor], Tensor]:
            return lambda acts: cache.setdefault(site.name, acts)

        sites = [Site(layer, point) for layer in range(self.n_layers) for point in ("pre", "post")]
        with self._hooked([(site, keep(site)) for site in sites if wanted is None or wanted(site.name)]):
            logits = self._forward(batch, batch.ids.shape[1], None).logits
        return logits, cache

    @contextmanager
    def edited(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Inside, every forward of the model has the edits applied."""
        changes = [(site, _bound(edit)) for site, edit in edits_in_order(edits, self.n_layers)]
        with self._hooked(changes):
            yield

    @contextmanager
    def _hooked(self, changes: list[tuple[Site, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
        handles = []
        try:
            for site, change in changes:
                handles.append(_attach(self.layers[site.layer], site, change))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, tokens: TokenBatch, new: int, cache: Any, **kwargs: Any) -> Any:
        tokens = tokens.to(self.device)
        off = self.model.disable_adapter() if self.adapter == "off" else nullcontext()
        with off, evaluating(self.model):
            return self.model(
                input_ids=tokens.ids[:, -new:],
                attention_mask=tokens.attention_mask.long(),
                position_ids=tokens.position_ids[:, -new:],
                past_key_values=cache,
                use_cache=cache is not None,
                **kwargs,
            )


def _bound(edit: Any) -> Callable[[Tensor], Tensor]:
    return lambda acts: apply_edit(edit, acts)


def _attach(layer: nn.Module, site: Site, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` hung on a block's input or output, which may be a tensor or a tuple that starts with it."""

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def on_input(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    if site.point == "post":
        return layer.register_forward_hook(on_output)
    return layer.register_forward_pre_hook(on_input, with_kwargs=True)
