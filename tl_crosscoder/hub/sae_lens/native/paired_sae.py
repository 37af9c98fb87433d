"""One model's half of a crosscoder, exact because it is told the other model's activations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_crosscoder.errors import HookNotFound, ShapeMismatch
from tl_crosscoder.hub.sae_lens.native.precision import FollowsPrecision

#: The other models' activations for the forward pass under way: a tensor, or a function that gives it.
Others = Tensor | Callable[[], Tensor]


class PairedSAE(FollowsPrecision):
    """An SAE of one model whose codes are the crosscoder's own: it reads the other model's activations at the same tokens.

    Inside ``with sae.bound(other_acts):`` it can be attached like any SAE, with or without the error term; ``other_acts`` is
    [..., d_model] of the same tokens, or a function that gives it for the forward pass under way.  ``bound`` raises HookNotFound
    if nothing ran it: SAE-Lens skips an SAE whose hook a model does not have.
    """

    W_enc_other: nn.Parameter
    b_enc: nn.Parameter
    threshold: nn.Parameter

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._others: Others | None = None
        self._read = 0

    @contextmanager
    def bound(self, other_acts: Others) -> Iterator["PairedSAE"]:
        """Inside, the SAE reads these activations of the other model; afterwards what it read before."""
        before, self._others, self._read = self._others, other_acts, 0
        try:
            yield self
            if not self._read:
                raise HookNotFound(
                    f"nothing ran this SAE while it was bound: no model has the hook {self.cfg.metadata.hook_name!r} of its "
                    "metadata, or it was not attached"
                )
        finally:
            self._others = before

    def encode(self, x: Tensor) -> Tensor:
        sae_in = self.process_sae_in(x)
        pre = sae_in @ self.W_enc + self._from_other(sae_in) + self.b_enc
        return self.hook_sae_acts_post(self._chosen(self.hook_sae_acts_pre(pre)))

    def decode(self, feature_acts: Tensor) -> Tensor:
        recon = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recon), self.d_head)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        zeros = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(zeros)
        d_in_other = getattr(self.cfg.metadata, "d_in_other", None) or self.cfg.d_in  # models of unlike width
        self.W_enc_other = nn.Parameter(self.W_enc.new_zeros(d_in_other, self.cfg.d_sae))
        if not hasattr(self.cfg, "k"):
            self.threshold = nn.Parameter(zeros.clone())

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        if not hasattr(self.cfg, "k"):
            return super().get_activation_fn()
        from sae_lens.saes.topk_sae import TopK

        return TopK(self.cfg.k)

    def fold_W_dec_norm(self) -> None:
        """By the norms of this model's decoder."""
        if hasattr(self.cfg, "k"):
            raise TypeError("folding decoder norms would change which k latents are the largest")
        norms = self.fold_and_get_W_dec_norm()
        self.W_enc_other.data.mul_(norms)
        self.threshold.data.mul_(norms)

    def save_model(self, path: Any) -> Any:
        raise ValueError(
            f"not saved to {path}: this SAE is half of a crosscoder and means nothing without the other model; save the "
            "crosscoder, or an approximation of one model's half, tl_crosscoder.as_sae(...)"
        )

    def _from_other(self, sae_in: Tensor) -> Float[Tensor, "*batch d_sae"]:
        if self._others is None:
            raise RuntimeError(
                "this SAE also reads the other model: run it inside `with sae.bound(other_acts):`, with the other model's "
                "activations at the same hook and tokens"
            )
        other = self._others if isinstance(self._others, Tensor) else self._others()
        if other.shape != (*sae_in.shape[:-1], len(self.W_enc_other)):
            raise ShapeMismatch(
                f"got activations {list(sae_in.shape)} of this model and {list(other.shape)} of the other; they must be of the "
                "same tokens.  While generating with a cache, bind a function that gives the other model's new tokens, or use "
                "ModelPair.generate"
            )
        self._read += 1
        return other.to(sae_in.device, self.dtype) @ self.W_enc_other

    def _chosen(self, pre: Tensor) -> Tensor:
        acts = self.activation_fn(pre)
        return acts if hasattr(self.cfg, "k") else acts * (pre > self.threshold).to(acts.dtype)
