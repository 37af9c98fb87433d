"""ModelPair: a base model and its fine-tune, read and edited at one hook."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.errors import PairMismatch
from tl_crosscoder.models.backends import Backend, HookBackend, as_backend
from tl_crosscoder.models.backends.hooks import Follower
from tl_crosscoder.models.backends.sites import parse_hook
from tl_crosscoder.models.loading import load_adapter, load_model, load_tokenizer, with_template
from tl_crosscoder.models.provenance import adapter_state, describe_model
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.types import BASE, TUNED, Edit

Side = Literal["base", "tuned"]

#: ``make_edit(other_acts)``: an edit for one model; ``other_acts()`` is the other model's activations at the very positions it edits.
MakeEdit = Callable[[Callable[[], Tensor]], Edit]


class ModelPair:
    """Two models that read the same tokens: ``base`` and ``tuned``, any model :func:`as_backend` knows, at one ``hook``.

    Raises PairMismatch, before anything is computed, for models that cannot be compared token by token.  ``check=False`` allows one
    model twice, the control in which nothing changed.
    """

    def __init__(self, base: Any, tuned: Any, *, hook: Any, tokenizer: Any = None, check: bool = True):
        self.base: Backend = as_backend(base)
        self.tuned: Backend = as_backend(tuned)
        self.hook = parse_hook(getattr(hook, "name", hook), self.tuned.n_layers).name
        parse_hook(self.hook, self.base.n_layers)
        known = [t for t in (tokenizer, self.tuned.tokenizer, self.base.tokenizer) if t is not None]
        self.tokenizer = with_template(known[0], self.base.tokenizer) if known else None
        if check:
            refuse_one_model_twice(self.base, self.tuned)
        refuse_unlike_models(self.base, self.tuned)
        refuse_unlike_tokenizers(self.base.tokenizer, self.tuned.tokenizer)
        refuse_missing_embeddings(self.tokenizer, self.base, self.tuned)

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
    ) -> Self:
        """A pair from Hub names or local folders: two models, or a base and a PEFT ``adapter`` for it.

        With an adapter both share one set of weights; ``merged=True`` merges it into a second copy, faster and twice the memory.
        """
        if (tuned is None) == (adapter is None):
            raise ValueError(
                f"wanted either a tuned model or an adapter, got tuned={tuned!r} and adapter={adapter!r}"
            )
        model = load_model(base, dtype=dtype, device=device, revision=revision, attention=attention)
        tokenizer = load_tokenizer(base, revision)
        if adapter is not None:
            return cls.from_adapter(
                load_adapter(model, adapter), hook=hook, tokenizer=tokenizer, merged=merged
            )
        assert tuned is not None
        other = load_model(tuned, dtype=dtype, device=device, revision=tuned_revision, attention=attention)
        other_tokenizer = load_tokenizer(tuned, tuned_revision)
        return cls(HookBackend(model, tokenizer), HookBackend(other, other_tokenizer), hook=hook)

    @classmethod
    def from_adapter(cls, peft_model: Any, *, hook: str, tokenizer: Any = None, merged: bool = False) -> Self:
        """A pair from one PEFT model: base is the model with its adapter disabled.

        ``merged=True`` merges the adapter into a copy: faster, twice the memory, and in low precision rounded differently.
        """
        tuned = HookBackend(peft_model, tokenizer)
        if merged:
            tuned = HookBackend(
                copy.deepcopy(peft_model).merge_and_unload().eval().requires_grad_(False), tokenizer
            )
            tuned.merged = True
        return cls(HookBackend(peft_model, tokenizer, adapter="off"), tuned, hook=hook, tokenizer=tokenizer)

    @property
    def d_in(self) -> int:
        return self.base.d_in

    def capture(self, batch: TokenBatch) -> Float[Tensor, "seq pos model d_in"]:
        """Both models' residual streams at ``hook`` on the same tokens, on base's device; values at padding mean nothing."""
        base, tuned = (backend.capture(batch, self.hook) for backend in (self.base, self.tuned))
        return torch.stack([base, tuned.to(base.device)], dim=2)

    def run(
        self, batch: TokenBatch, edit: Edit | None = None, side: Side = "tuned"
    ) -> Float[Tensor, "seq pos d_vocab"]:
        """One model's logits, with ``edit`` applied at ``hook``."""
        return self.sides(side)[0].run(batch, {} if edit is None else {self.hook: edit})

    def generate(
        self,
        batch: TokenBatch,
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
        exactly the positions being edited: the left-padded prompt first, then each new token.
        """
        edited, other = self.sides(side)
        options = {"temperature": temperature, "seed": seed, "stop_ids": stop_ids}
        if make_edit is None:
            return edited.generate(batch, max_new_tokens, **options)
        follower = Follower(other, batch, self.hook)
        latest: list[Tensor] = []

        def follow(ids: Tensor, step: int) -> None:  # noqa: ARG001
            latest[:] = [follower.extend(ids).to(edited.device)]

        edit = make_edit(lambda: latest[0])
        return edited.generate(batch, max_new_tokens, {self.hook: edit}, before_forward=follow, **options)

    def sides(self, side: Side) -> tuple[Backend, Backend]:
        """The chosen model and the other one."""
        if side not in ("base", "tuned"):
            raise ValueError(f"side must be 'base' or 'tuned', got {side!r}")
        return (self.base, self.tuned) if side == "base" else (self.tuned, self.base)

    def description(self) -> dict[str, Any]:
        """What was compared and how, JSON-able: both models, hook, library versions.  Local paths are cut to their last part."""
        models = [describe_model(backend) for backend in (self.base, self.tuned)]
        return {
            "base": models[BASE],
            "tuned": models[TUNED],
            "hook": self.hook,
            "d_in": self.d_in,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    @property
    def fingerprint(self) -> str:
        """sha256 over both models' fingerprints and the hook: equal when the activations would be."""
        parts = self.description()
        key = [
            self.hook,
            *(
                parts[side][field]
                for side in ("base", "tuned")
                for field in ("fingerprint", "adapter", "dtype")
            ),
        ]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def refuse_one_model_twice(base: Backend, tuned: Backend) -> None:
    same = base.model is tuned.model and getattr(base, "adapter", None) == getattr(tuned, "adapter", None)
    if same:
        raise PairMismatch(
            f"base and tuned are the same {type(base.model).__name__} object, so nothing can differ; "
            "for a control in which nothing changed pass check=False"
        )
    if adapter_state(base) == "on" and adapter_state(tuned) is None:
        raise PairMismatch(
            "base carries the adapter; the roles look swapped: pass the plain model as base, or use ModelPair.from_adapter"
        )


def refuse_unlike_models(base: Backend, tuned: Backend) -> None:
    for name, what in (("d_in", "width"), ("n_layers", "number of blocks"), ("dtype", "dtype")):
        if (left := getattr(base, name)) != (right := getattr(tuned, name)):
            raise PairMismatch(
                f"base has {what} {left} and tuned {right}; a pair is one architecture in one precision, "
                "before and after fine-tuning"
            )


def refuse_unlike_tokenizers(base: Any, tuned: Any) -> None:
    if base is None or tuned is None or base is tuned:
        return
    left, right = base.get_vocab(), tuned.get_vocab()
    if left != right:
        token = min((t for t in left.keys() | right.keys() if left.get(t) != right.get(t)), key=str)
        raise PairMismatch(
            f"the two tokenizers differ: base has {len(left)} tokens and tuned {len(right)}; {token!r} is {left.get(token)} "
            f"in base and {right.get(token)} in tuned; both models must read the same ids"
        )
    if base.bos_token_id != tuned.bos_token_id:
        raise PairMismatch(
            f"the two tokenizers differ: base starts a text with id {base.bos_token_id}, tuned with {tuned.bos_token_id}"
        )


def refuse_missing_embeddings(tokenizer: Any, base: Backend, tuned: Backend) -> None:
    if tokenizer is None:
        return
    for side, backend in (("base", base), ("tuned", tuned)):
        rows = getattr(backend, "d_vocab", None)
        if rows is not None and len(tokenizer) > rows:
            raise PairMismatch(
                f"the tokenizer has {len(tokenizer)} tokens, but {side} has only {rows} embedding rows; "
                "tokens added for the fine-tune have no meaning there"
            )
