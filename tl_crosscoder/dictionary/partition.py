"""Which latents are shared by the models for good, and which belong to one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tl_crosscoder.dictionary.prefix import first_latents
from tl_crosscoder.dictionary.shard import Shard
from tl_crosscoder.types import BASE, TUNED

#: A fused optimiser may round this many last numbers of a tensor otherwise than the rest.
REMAINDER = 16

#: ``project(rows, first=0)``: the rows of latents ``first`` and following, moved in place.
Projection = Callable[..., Tensor]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a dictionary lie, one after the other; ``free`` is what is left."""

    shared: slice
    base: slice
    tuned: slice
    free: slice


@dataclass(frozen=True)
class Partition:
    """The first ``shared`` latents have one decoder for all models; the next ``base`` write to base only, the next ``tuned`` to
    tuned only; the rest is free.  Each is a number of latents (int) or a share of d_sae (float).

    Of a latent that belongs to one model, the other model's decoder is 0 and, with ``mask_encoder``, its encoder too, so that the
    latent does not read that model either.  Encoders of shared latents are free.

    The weights start in the partition and gradients are moved onto it: exact ties and exact zeros last through momentum, weight
    decay and resuming, under any optimiser that treats every number alike.  Each model's copy of a shared decoder gets the mean
    of the copies' gradients: their sum is the gradient of the one decoder.

    Ties are in normalised units: where the normaliser scales the models differently, raw rows differ by that factor.
    ``delta_norm`` is .5 for shared latents, 0 for base-only and 1 for tuned-only ones by construction: it says nothing about what
    they are about.  Ask Latent Scaling, which is undefined for base-only latents.

    Source: shared decoders: Circuits Updates, January and February 2025 (designated shared features).  Dedicated latents:
    Jiralerspong & Bricken 2026, arXiv:2602.11729, whose text masks decoders only.
    """

    shared: int | float = 0
    base: int | float = 0
    tuned: int | float = 0
    mask_encoder: bool = True

    @property
    def free(self) -> bool:
        """No latent is bound."""
        return not (self.shared or self.base or self.tuned)

    def parts(self, d_sae: int) -> Parts:
        """The latents of each part."""
        cuts = [0]
        for name in ("shared", "base", "tuned"):
            cuts.append(cuts[-1] + first_latents(getattr(self, name), d_sae))
        if cuts[-1] > d_sae:
            raise ValueError(
                f"the partition wants {cuts[-1]} latents (shared={self.shared}, base={self.base}, tuned={self.tuned}), "
                f"the dictionary has d_sae={d_sae}"
            )
        return Parts(*(slice(a, b) for a, b in zip(cuts, [*cuts[1:], d_sae], strict=True)))

    def of(self, shard: Shard, d_sae: int) -> "Partition":
        """The partition of the latents that are in this process."""
        parts = self.parts(d_sae)
        counts = [
            shard.n_held(part.stop) - shard.n_held(part.start)
            for part in (parts.shared, parts.base, parts.tuned)
        ]
        return replace(self, shared=counts[0], base=counts[1], tuned=counts[2])

    def check(self, d_sae: int, n_models: int, d_in: int) -> None:
        """Refuse a dictionary that cannot be parted so."""
        shared = self.parts(d_sae).shared.stop
        if (self.base or self.tuned) and n_models != 2:
            raise ValueError(f"base-only and tuned-only latents want 2 models, got n_models={n_models}")
        if shared and n_models < 2:
            raise ValueError(f"a decoder is shared by 2 models or more, got n_models={n_models}")
        row = n_models * d_in
        if shared and (d_sae - shared) * row < REMAINDER:
            raise ValueError(
                f"shared={self.shared} of d_sae={d_sae} latents leaves fewer than {REMAINDER} weights after them, which fused "
                f"optimisers round differently; leave {-(-REMAINDER // row)} latents or more unshared"
            )

    @torch.no_grad()
    def project_decoder(
        self, rows: Float[Tensor, "latent model d_in"], d_sae: int, first: int = 0
    ) -> Float[Tensor, "latent model d_in"]:
        """Decoders, or their gradients, of latents ``first`` and following, moved in place to the nearest ones in the partition."""
        shared = rows[_within(self.parts(d_sae).shared, first)]
        shared.copy_(shared.mean(1, keepdim=True))
        return self._zero_other_model(rows, d_sae, first)

    @torch.no_grad()
    def project_encoder(
        self, rows: Float[Tensor, "latent model d_in"], d_sae: int, first: int = 0
    ) -> Float[Tensor, "latent model d_in"]:
        """As ``project_decoder``, for encoders."""
        return self._zero_other_model(rows, d_sae, first) if self.mask_encoder else rows

    def hold(self, W_enc_rows: nn.Parameter, W_dec: nn.Parameter, *, check: bool) -> None:
        """From now on gradients of these weights stay in the partition; ``check``: raise ValueError unless the weights do."""
        d_sae = len(W_dec)
        bound = self.parts(d_sae).free.start
        for parameter, project in ((W_enc_rows, self.project_encoder), (W_dec, self.project_decoder)):
            if not parameter.requires_grad:
                continue
            if parameter not in _HELD:
                held = _HELD[parameter] = _Held(partial(project, d_sae=d_sae))
                parameter.register_post_accumulate_grad_hook(held.on_gradient)
            if check and not _HELD[parameter].checked:
                rows = parameter.detach()[:bound]
                if not torch.equal(project(rows.clone(), d_sae), rows):
                    raise ValueError(
                        f"the weights are not in their partition ({self}): load those that were trained with it. A folded "
                        "crosscoder of models on different scales cannot be trained: train it first, then fold it"
                    )
                _HELD[parameter].checked = True

    @staticmethod
    def check_again(*parameters: nn.Parameter) -> None:
        """Look at these weights anew before they are trained: others may have been loaded into them."""
        for parameter in parameters:
            if parameter in _HELD:
                _HELD[parameter].checked = False

    def _zero_other_model(self, rows: Tensor, d_sae: int, first: int) -> Tensor:
        parts = self.parts(d_sae)
        rows[_within(parts.base, first), TUNED:] = 0
        rows[_within(parts.tuned, first), BASE] = 0
        return rows


class _Held:
    """A parameter whose gradients are moved onto a partition."""

    def __init__(self, project: Projection):
        self.project, self.checked = project, False

    def on_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.project(parameter.grad)


#: Copies, loaded weights and weights on other devices are other parameters, without the hooks of the first: they are held anew.
_HELD: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def projection(parameter: Tensor) -> Projection | None:
    """What moves rows of this parameter's gradient onto its partition, for an optimiser that makes gradients block by block."""
    held = _HELD.get(parameter)
    return held.project if held else None


def _within(part: slice, first: int) -> slice:
    """The part in rows that start at latent ``first``; what lies beyond them is cut off by indexing."""
    return slice(max(0, part.start - first), max(0, part.stop - first))
