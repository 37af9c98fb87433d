"""ModelPair: a base model and its fine-tune, read and edited at one hook."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.models.alongside import Alongside
from tl_crosscoder.models.backends import Backend, HookBackend, as_backend
from tl_crosscoder.models.backends.base import LiveBackend
from tl_crosscoder.models.backends.sites import parse_hook
from tl_crosscoder.models.cache import NamesFilter, crosscoder_entries, wants
from tl_crosscoder.models.follower import Follower
from tl_crosscoder.models.loading import load_adapter, load_model, outline
from tl_crosscoder.models.pair_checks import refuse_one_model_twice, refuse_unlike_models
from tl_crosscoder.models.provenance import describe_model, fingerprint
from tl_crosscoder.models.tokens import Tokens, as_batch
from tl_crosscoder.types import Edit
from tl_crosscoder.widths import alike, padded

Side = Literal["base", "tuned"]

#: ``make_edit(other_acts)``: an edit for one model; ``other_acts()`` is what the other has at the very positions being edited.
MakeEdit = Callable[[Callable[[], Tensor]], Edit]


class ModelPair:
    """Two models that read the same tokens: ``base`` and ``tuned``, each any model :func:`as_backend` knows, at one ``hook``.

    Raises PairMismatch, before anything is computed, for models that cannot be compared token by token.  ``check=False`` allows
    one model twice, the control in which nothing changed.

    ``unlike=True``: two models with one tokenizer, of any widths and depths.  What is captured of the narrower one is padded with
    zeros up to ``d_in``, the larger of ``widths``; edits and what they read are each model's own.
    """

    def __init__(
        self,
        base: Any,
        tuned: Any,
        *,
        hook: Any,
        tokenizer: Any = None,
        check: bool = True,
        unlike: bool = False,
    ):
        self.base: Backend = as_backend(base, tokenizer)
        self.tuned: Backend = as_backend(tuned, tokenizer)
        n_layers = min(self.base.n_layers, self.tuned.n_layers)
        self.hook = parse_hook(getattr(hook, "name", hook), n_layers).name
        if check:
            refuse_one_model_twice(self.base, self.tuned)
        self.tokenizer = refuse_unlike_models(self.base, self.tuned, tokenizer, unlike=unlike)
        self.adapter_name: str | None = None
        self._along: Alongside | None = None

    @classmethod
    def load(
        cls,
        base: str | Path,
        tuned: str | Path | None = None,
        *,
        hook: str,
        adapter: str | Path | None = None,
        merged: bool = False,
        dtype: torch.dtype | str = "float32",
        device: str | torch.device = "cpu",
        revision: str | None = None,
        tuned_revision: str | None = None,
        attention: str | None = None,
        unlike: bool = False,
    ) -> "ModelPair":
        """A pair from Hub names or local folders: two models, or a base and a PEFT ``adapter`` for it.

        With an adapter both share one set of weights; ``merged=True`` merges it into a second copy, faster and twice the memory.
        ``attention`` is transformers' ``attn_implementation``, the same for both.
        """
        if (tuned is None) == (adapter is None):
            raise ValueError(
                f"wanted either a tuned model or an adapter, got tuned={tuned!r} and adapter={adapter!r}"
            )
        first = outline(base, dtype, revision)
        second = first if tuned is None else outline(tuned, dtype, tuned_revision)
        parse_hook(hook, min(first.n_layers, second.n_layers))
        refuse_unlike_models(first, second, unlike=unlike)  # before gigabytes are read
        options = {"dtype": dtype, "device": device, "attention": attention}
        model = load_model(base, revision=revision, **options)
        if tuned is not None:
            other = load_model(tuned, revision=tuned_revision, **options)
            sides = HookBackend(model, first.tokenizer), HookBackend(other, second.tokenizer)
            return cls(*sides, hook=hook, unlike=unlike)
        if merged:
            changed = load_adapter(copy.deepcopy(model), adapter or "")
            pair = cls(HookBackend(model, first.tokenizer), merge(changed, first.tokenizer), hook=hook)
        else:
            changed = load_adapter(model, adapter or "")
            pair = cls.from_adapter(changed, hook=hook, tokenizer=first.tokenizer)
        pair.adapter_name = Path(adapter or "").name
        return pair

    @classmethod
    def from_adapter(
        cls, peft_model: Any, *, hook: str, tokenizer: Any = None, merged: bool = False
    ) -> "ModelPair":
        """A pair from one PEFT model: base is the model with its adapter disabled.

        ``merged=True`` merges the adapter into a copy: faster, twice the memory, and in low precision rounded differently.
        """
        base, tuned = HookBackend(peft_model, tokenizer, adapter="off"), HookBackend(peft_model, tokenizer)
        if merged:
            tuned = merge(copy.deepcopy(peft_model), tokenizer)
        return cls(base, tuned, hook=hook)

    @property
    def widths(self) -> tuple[int, int]:
        return self.base.d_in, self.tuned.d_in

    @property
    def d_in(self) -> int:
        return max(self.widths)

    def capture(self, batch: Tokens) -> Float[Tensor, "seq pos model d_in"]:
        """Both models' residual streams at ``hook`` on the same tokens, on base's device.  Values at padding mean nothing.

        Integer ids [seq, pos] are a batch in which every token is real.
        """
        batch = as_batch(batch, self.tokenizer)
        base, tuned = (backend.capture(batch, self.hook) for backend in (self.base, self.tuned))
        return torch.stack([padded(base, self.d_in), padded(tuned, self.d_in).to(base.device)], dim=2)

    def run(
        self, batch: Tokens, edit: Edit | None = None, side: Side = "tuned"
    ) -> Float[Tensor, "seq pos d_vocab"]:
        """One model's logits, with ``edit`` applied at ``hook``."""
        batch = as_batch(batch, self.tokenizer)
        return self.sides(side)[0].run(batch, {} if edit is None else {self.hook: edit})

    def generate(
        self,
        batch: Tokens,
        max_new_tokens: int,
        make_edit: MakeEdit | None = None,
        *,
        side: Side = "tuned",
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
    ) -> Int[Tensor, "seq new"]:
        """New token ids of one model, edited with the other model's activations at hand.

        ``make_edit(other_acts)`` returns the edit; inside it ``other_acts()`` is the other model's residual stream at ``hook`` for
        exactly the positions being edited: the prompt first, then each new token.

        Raises ValueError for an edit of a batch that is not left-padded: a mask made for it would mean other tokens.
        """
        batch = as_batch(batch, self.tokenizer)
        edited, other = self.sides(side)
        options: dict[str, Any] = {"temperature": temperature, "seed": seed, "stop_ids": stop_ids}
        if make_edit is None:
            return edited.generate(batch, max_new_tokens, **options)
        if not batch.is_left_padded:
            row = int((~batch.attention_mask[:, -1]).long().argmax())
            raise ValueError(
                f"row {row} of this batch ends in padding; generation pads on the left, where an edit's mask would mean "
                'other tokens.  Pass batch.padded("left") or corpus.batch(indices, pad="left"), and make masks for that.'
            )
        follower = Follower(other, batch, self.hook)
        latest: list[Tensor] = []

        def follow(ids: Tensor, _step: int) -> None:
            latest[:] = [follower.extend(ids).to(edited.device)]

        edit = make_edit(lambda: latest[0])
        return edited.generate(batch, max_new_tokens, {self.hook: edit}, before_forward=follow, **options)

    @contextmanager
    def hooks(self, *edits: Edit, side: Side = "tuned") -> Iterator[None]:
        """Inside, one model has the edits at ``hook`` however it is run: its own forward, its own ``generate``, an nnsight trace.

        The other model reads along, and :meth:`other` is what it has at the tokens under way::

            with pair.hooks(tlc.ablate(crosscoder, latents, pair.other)):
                model.generate(...)

        Nothing is left behind.  Beam search is followed through every exchange of texts, the other model reading them anew.
        """
        edited, other = self._live(side), self.sides(side)[1]
        along = Alongside(other, self.hook)

        def edit(acts: Tensor, hook: Any = None) -> Tensor:
            for step in () if along.busy else edits:
                acts = step(acts, hook=hook)
            return acts

        outer, self._along = self._along, along
        try:
            with edited.attached({self.hook: edit}, along.read):
                yield
        finally:
            self._along = outer

    def other(self) -> Float[Tensor, "seq pos d_in"]:
        """What the model that is not being edited has at ``hook``, at the tokens under way; inside :meth:`hooks` only."""
        if self._along is None or self._along.acts is None:
            raise RuntimeError(
                "pair.other() is the other model's activations while a model runs inside pair.hooks(...); elsewhere capture them: "
                "pair.capture(batch)[:, :, BASE]."
            )
        return self._along.acts

    def run_with_cache(
        self,
        batch: Tokens,
        *,
        crosscoder: Any = None,
        names_filter: NamesFilter = None,
        side: Side = "tuned",
    ) -> tuple[Float[Tensor, "seq pos d_vocab"], Any]:
        """One model's logits and a TransformerLens ``ActivationCache``; with a crosscoder, its latents as well.

        These are ``crosscoder.hook_latents [seq pos d_sae]``, ``crosscoder.hook_recon`` and ``crosscoder.hook_error
        [seq pos model d_in]``, of both models' activations at ``hook``, raw units, 0 at padding.  Through plain hooks and nnsight
        the other keys are the residual stream before and after each block.  ``names_filter`` as in TransformerLens; with a large
        dictionary ask for what is needed, since ``hook_latents`` is dense.
        """
        from transformer_lens import ActivationCache

        batch, wanted = as_batch(batch, self.tokenizer), wants(names_filter)
        backend = self._live(side)
        logits, cache = backend.run_with_cache(batch, wanted)
        if crosscoder is not None:
            cache |= crosscoder_entries(crosscoder, self.capture(batch), batch, wanted)
        return logits, ActivationCache(cache, backend.model)

    def sides(self, side: str) -> tuple[Backend, Backend]:
        """The chosen model and the other one."""
        if side not in ("base", "tuned"):
            raise ValueError(f"side must be 'base' or 'tuned', got {side!r}")
        return (self.base, self.tuned) if side == "base" else (self.tuned, self.base)

    def _live(self, side: str) -> LiveBackend:
        backend = self.sides(side)[0]
        if not isinstance(backend, LiveBackend):
            raise TypeError(
                f"{type(backend).__name__} has no attached() and run_with_cache(); wanted a LiveBackend"
            )
        return backend

    def description(self) -> dict[str, Any]:
        """What was compared and how, JSON-able; of a local path only the last part."""
        return {
            "base": describe_model(self.base),
            "tuned": describe_model(self.tuned) | {"adapter_name": self.adapter_name},
            "hook": self.hook,
            "d_in": self.d_in,
            **({} if alike(self) else {"widths": list(self.widths)}),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    @property
    def fingerprint(self) -> str:
        """sha256 over both models' fingerprints, their precision and the hook."""
        models = [[fingerprint(model), str(model.dtype)] for model in (self.base, self.tuned)]
        return hashlib.sha256(json.dumps([self.hook, models]).encode()).hexdigest()


def merge(peft_model: Any, tokenizer: Any) -> HookBackend:
    """The model with its adapter merged into the weights, which are changed in place."""
    return HookBackend(
        peft_model.merge_and_unload().eval().requires_grad_(False), tokenizer, adapter="merged"
    )
