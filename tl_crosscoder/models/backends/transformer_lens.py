"""TransformerLens models: ``HookedTransformer`` (TransformerLens 3) and ``TransformerBridge`` (3 and 4)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.errors import HookNotFound, PairMismatch
from tl_crosscoder.models.backends.base import BeforeForward, Stop, apply_edit, evaluating
from tl_crosscoder.models.backends.generation import decode, stop_and_pad
from tl_crosscoder.models.backends.sites import Site, decoder_layers, edits_in_order, parse_hook
from tl_crosscoder.models.backends.watching import OnTokens, watching_decoder, watching_hooked_transformer
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.types import Edit


class TransformerLensBackend:
    """A ``HookedTransformer`` or ``TransformerBridge`` read through its own hook points.

    Raises PairMismatch for weights that were centred on loading, which moves the residual stream and leaves the
    predictions, and for an adapter that a bridge does not pass through: the fine-tune would look like its base.
    """

    def __init__(self, model: Any, tokenizer: Any = None):
        self.model = model
        self.tokenizer = tokenizer if model.tokenizer is None else model.tokenizer
        self.is_bridge = "original_model" in vars(model)
        self._names = frozenset(
            model.hook_dict
        )  # a hook on an unknown name would be ignored, in TransformerLens 3
        refuse_centred_weights(model)
        if self.is_bridge:
            self._refuse_bypassed_adapter()

    @property
    def module(self) -> Any:
        """The torch module that holds the weights."""
        return self.model.original_model if self.is_bridge else self.model

    @property
    def n_layers(self) -> int:
        return self.model.cfg.n_layers

    @property
    def d_in(self) -> int:
        return self.model.cfg.d_model

    @property
    def d_vocab(self) -> int:
        """Rows of the embedding, at least the tokenizer's length."""
        return self.model.cfg.d_vocab

    @property
    def dtype(self) -> torch.dtype:
        # ``cfg.dtype`` says float32 for a bfloat16 model that was passed in.
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def capture(self, batch: TokenBatch, hook: str) -> Float[Tensor, "seq pos d_in"]:
        """The residual stream at ``hook``; no later layer runs."""
        seen: list[Tensor] = []

        # Not ``stop_at_layer``: after the last block a bridge would still run the unembedding.
        def stop(acts: Tensor, hook: Any = None) -> Tensor:  # noqa: ARG001
            seen.append(acts)
            raise Stop

        try:
            self._forward(batch, batch.ids.shape[1], None, {parse_hook(hook, self.n_layers): stop})
        except Stop:
            return seen[0]
        raise RuntimeError(f"{type(self.model).__name__} ran to its end without passing {hook!r}")

    @torch.no_grad()
    def run(self, batch: TokenBatch, edits: Mapping[str, Edit] = {}) -> Float[Tensor, "seq pos d_vocab"]:
        """Logits, with each edit applied at its hook."""
        return self._forward(batch, batch.ids.shape[1], None, self._hooks(edits))

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
        """New token ids through a key-value cache; edits see the left-padded prompt, then each new token."""
        cache = self._new_cache(len(batch))
        hooks = self._hooks(edits)

        def step(tokens: TokenBatch, new: int) -> Tensor:
            return self._forward(tokens, new, cache, hooks)[:, -1]

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
        """Inside, every forward of the model tells first what it will read, and has the edits applied."""
        if self.is_bridge:
            path = decoder_layers(self.module)[0]
            watching = watching_decoder(self.module.get_submodule(path.rpartition(".")[0]), on_tokens)
        else:
            watching = watching_hooked_transformer(self.model, on_tokens)
        fwd_hooks = [(self._name(site), hook) for site, hook in self._hooks(edits).items()]
        with watching, self.model.hooks(fwd_hooks=fwd_hooks):
            yield

    def run_with_cache(
        self, batch: TokenBatch, wanted: Callable[[str], bool] | None
    ) -> tuple[Float[Tensor, "seq pos d_vocab"], dict[str, Tensor]]:
        """Logits, and everything that TransformerLens itself keeps, if it is wanted."""
        batch = batch.to(self.device)
        more = {"position_ids": batch.position_ids} if self.is_bridge else {}
        mask = batch.attention_mask.long()
        with evaluating(self.module):
            logits, cache = self.model.run_with_cache(
                batch.ids, names_filter=wanted, attention_mask=mask, **more
            )
        return logits, dict(cache.items())

    def _hooks(self, edits: Mapping[str, Edit]) -> dict[Site, Any]:
        def host(edit: Any) -> Any:
            return lambda acts, hook=None: apply_edit(edit, acts, hook)  # TransformerLens names the hook

        return {site: host(edit) for site, edit in edits_in_order(edits, self.n_layers)}

    def _name(self, site: Site) -> str:
        """The site's name among the model's hooks: of its two names, SAE-Lens' bridge knows the newer one alone."""
        newer = f"blocks.{site.layer}.{'hook_out' if site.point == 'post' else 'hook_in'}"
        for name in (site.name, newer):
            if name in self._names:
                return name
        raise HookNotFound(f"{type(self.model).__name__} has no hook {site.name!r}")

    def _new_cache(self, n_seq: int) -> Any:
        if self.is_bridge:
            from transformers import DynamicCache

            return DynamicCache(config=self.module.config)
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.device, n_seq)

    def _forward(self, tokens: TokenBatch, new: int, cache: Any, hooks: Mapping[Site, Any]) -> Tensor:
        """Logits of the last ``new`` positions, the earlier ones being in ``cache``."""
        fwd_hooks = [(self._name(site), fn) for site, fn in hooks.items()]
        tokens = tokens.to(self.device)
        ids, mask = tokens.ids[:, -new:], tokens.attention_mask.long()
        with evaluating(self.module), self.model.hooks(fwd_hooks=fwd_hooks):
            if not self.is_bridge:
                # This class keeps the mask of earlier tokens in the cache, and reads positions off the mask.
                return self.model(ids, attention_mask=mask[:, -new:], past_kv_cache=cache)
            return self.model(
                ids,
                attention_mask=mask,
                position_ids=tokens.position_ids[:, -new:],
                past_key_values=cache,
                use_cache=cache is not None,
            )

    @torch.no_grad()
    def _refuse_bypassed_adapter(self) -> None:
        adapters = {name: m for name, m in self.module.named_modules() if hasattr(m, "adapter_layer_names")}
        called: set[str] = set()
        handles = [
            m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in adapters.items()
        ]
        try:
            if adapters:
                ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
                self._forward(TokenBatch.from_ids(ids), 2, None, {})
        finally:
            for handle in handles:
                handle.remove()
        if missed := sorted(adapters.keys() - called):
            raise PairMismatch(
                f"this bridge does not pass through {len(missed)} adapter layers, such as "
                f"{missed[0]!r}, so the fine-tune would look like its base; call merge_and_unload() on the PEFT "
                "model and bridge the result"
            )


def refuse_centred_weights(model: Any) -> None:
    """Raises PairMismatch if what block 0 writes to the residual stream has been centred over d_model."""
    for part, name in (("mlp", "W_out"), ("attn", "W_O")):
        weight = getattr(getattr(model.blocks[0], part, None), name, None)
        if isinstance(weight, Tensor) and _is_centred(weight.detach().float()):
            raise PairMismatch(
                "the weights of this model were centred on loading (center_writing_weights), so its residual stream "
                "is not the trained model's; load it with HookedTransformer.from_pretrained_no_processing or as a "
                "TransformerBridge without weight processing"
            )


def _is_centred(weight: Tensor) -> bool:
    """Rounded to bfloat16, centred means are 5e-4 of the weights' size at width 16, less above; uncentred ones near 3e-2."""
    return bool(weight.mean(dim=-1).abs().mean() <= 1e-3 * weight.abs().mean())
