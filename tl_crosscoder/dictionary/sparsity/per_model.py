"""A choice of its own for each model."""

from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.dictionary.scores import Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity


@SPARSITIES.register("per_model")
class PerModel(Sparsity):
    """Each model's part chooses by that model's scores, ``relu(pre_act_j) · ‖d_j^m‖``; a latent is active where any model has it.

    An activation is one number for all models and a gate for each: what a model does not choose is not written into it.  It is the
    choice of ``code_norm="decoupled"``.  Parts choose pairs of the pre-activations as they are: not :class:`JumpReLU`, whose
    gradient is its own.

    Source: the code of Minder et al. 2025, arXiv:2504.02922 (``DECOUPLED``).
    """

    def __init__(self, parts: tuple[Sparsity, ...]):
        super().__init__()
        if len(parts) < 2 or len(set(map(id, parts))) < len(parts):
            raise ValueError(
                f"PerModel wants a sparsity of its own for each of two or more models, got {parts}"
            )
        if wrong := [
            part for part in parts if isinstance(part, PerModel) or not deepcopy(part).train().selects
        ]:
            raise ValueError(
                f"PerModel wants sparsities that choose by a score, such as BatchTopK; got {wrong[0]}"
            )
        for m, part in enumerate(parts):
            self.add_module(str(m), part)
        self._count()

    @property
    def parts(self) -> tuple[Sparsity, ...]:
        """The sparsity of each model."""
        return tuple(part for part in self.children() if isinstance(part, Sparsity))

    def check(self, d_sae: int) -> None:
        for part in self.parts:
            part.check(d_sae)

    def advance(self, step: int, steps: int) -> None:
        for part in self.parts:
            part.advance(step, steps)
        self._count()

    def restricted(self, latents: Int[Tensor, "latent"]) -> "PerModel | None":
        parts = [made for part in self.parts if (made := part.restricted(latents)) is not None]
        return PerModel(tuple(parts)) if len(parts) == len(self.parts) else None

    def choose(self, scores: Scores) -> Found:
        if scores.norms.shape[1:] != (len(self.parts),):
            raise ValueError(
                f"PerModel chooses by norms [d_sae, model={len(self.parts)}], got {list(scores.norms.shape)}: it belongs to "
                "code_norm='decoupled'"
            )
        found = [part.choose(scores.of_model(m)) for m, part in enumerate(self.parts)]
        places = torch.cat([part.latents * scores.n_tokens + part.tokens for part in found])
        union, inverse = places.unique(return_inverse=True)
        gates = union.new_zeros(len(union), len(found), dtype=torch.bool)
        pre_acts = union.new_zeros(len(union), dtype=found[0].pre_acts.dtype)
        for m, (part, at) in enumerate(zip(found, inverse.split([len(part) for part in found]), strict=True)):
            gates[at, m] = True
            pre_acts[at] = part.pre_acts
        tokens, latents = union % scores.n_tokens, union // scores.n_tokens
        best = pre_acts * (scores.norms[latents] * gates).amax(-1)
        return Found(tokens, latents, pre_acts, best, gates)

    def gates(
        self, acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "d_sae model"]
    ) -> Float[Tensor, "batch d_sae model"]:
        """1 where a model would choose an activation of that strength in ``eval()``, else 0."""
        if self.training:
            raise RuntimeError(
                "while training the batch decides which models have a latent: pass Codes, or eval() first"
            )
        chosen = [part(acts, norms[:, m]) != 0 for m, part in enumerate(self.parts)]
        return torch.stack(chosen, -1).to(acts.dtype)

    def _count(self) -> None:
        """Latents per token that each model asks for, where all ask for the same number."""
        asked = {part.k_now for part in self.parts}
        self.k_now = asked.pop() if len(asked) == 1 else None
