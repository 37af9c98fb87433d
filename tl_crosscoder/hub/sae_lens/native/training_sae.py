"""A BatchTopK crosscoder that SAE-Lens' own trainer trains, on [batch, 2 · d_in]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import SPARSITIES, BatchTopK
from tl_crosscoder.hub.sae_lens.native.precision import FollowsPrecision
from tl_crosscoder.hub.sae_lens.words import block

ARCHITECTURE = "tl_crosscoder_batchtopk"


@dataclass
class CrosscoderTrainingConfig(BatchTopKTrainingSAEConfig):
    """``d_in`` is that of all models side by side.  ``code_norm``: what weighs an activation, as in :class:`Crosscoder`."""

    n_models: int = 2
    code_norm: Literal["sum", "l2"] = "sum"
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self):
        if self.d_in % self.n_models:
            raise ValueError(f"d_in={self.d_in} is not the width of {self.n_models} models side by side")
        if self.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} scales both models by one number or mixes their "
                "coordinates; normalise the batches with a Normalizer, and hand it to .crosscoder(normalizer)"
            )
        if not self.rescale_acts_by_decoder_norm or self.use_sparse_activations or self.apply_b_dec_to_input:
            raise ValueError(
                "a crosscoder weighs activations by its decoders' norms, dense in training, and subtracts nothing before it "
                "encodes: leave rescale_acts_by_decoder_norm=True, use_sparse_activations=False, apply_b_dec_to_input=False"
            )
        super().__post_init__()

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """With the words of a crosscoder, so that the folder is one."""
        config = super().get_inference_sae_cfg_dict()
        sparsity = SPARSITIES.describe(BatchTopK(self.k))
        # the norms are folded into the weights there
        config["metadata"]["crosscoder"] = block(
            self.n_models, self.d_in // self.n_models, "f * code norm", {"sparsity": sparsity}
        )
        return config


class CrosscoderTrainingSAE(FollowsPrecision, BatchTopKTrainingSAE):
    """SAE-Lens' BatchTopK with the norm of a crosscoder in every place where it writes out the norm of the whole decoder row.

    The threshold, which moves by small parts of itself, stays in float64 in every precision.
    """

    cfg: CrosscoderTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def code_norms(self) -> Float[Tensor, "d_sae"]:
        norms = self.W_dec.unflatten(1, (self.cfg.n_models, -1)).norm(dim=-1)
        return norms.sum(-1) if self.cfg.code_norm == "sum" else norms.norm(dim=-1)

    def get_W_dec_norm(self) -> Tensor:
        """What is folded on export."""
        return self.code_norms().detach().clamp(min=1e-8)

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc) * self.code_norms()
        return self.hook_sae_acts_post(self.activation_fn(pre)), pre

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.hook_sae_recons((feature_acts / self.code_norms()) @ self.W_dec + self.b_dec)

    def calculate_topk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        """As SAE-Lens', with the norms that ``encode_with_hidden_pre`` weighed by."""
        n_dead = 0 if dead_neuron_mask is None else int(dead_neuron_mask.sum())
        if dead_neuron_mask is None or not n_dead:
            return sae_out.new_tensor(0.0)
        wanted = sae_in.shape[-1] // 2
        acts = calculate_topk_aux_acts(min(wanted, n_dead), hidden_pre, dead_neuron_mask)
        recon = (acts / self.code_norms()) @ self.W_dec
        loss = (recon - (sae_in - sae_out).detach()).square().sum(-1).mean()
        return self.cfg.aux_loss_coefficient * min(n_dead / wanted, 1.0) * loss

    def fold_activation_whitening(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "a whitening mixes the models' coordinates, so that no decoder would be a model's own and the code norm another; "
            "normalise the batches with a Normalizer, and hand it to .crosscoder(normalizer)"
        )

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["topk_threshold"] = state_dict["topk_threshold"].double()

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        before = self.topk_threshold
        super()._apply(fn, recurse)
        if self.topk_threshold.dtype != before.dtype:
            self.topk_threshold = before.to(self.device)
        return self

    @torch.no_grad()
    def crosscoder(self, normalizer: Normalizer | None = None) -> Crosscoder:
        """The crosscoder that it is, in ``eval()``; ``normalizer``: what the batches were normalised with."""
        n = self.cfg.n_models
        sparsity = BatchTopK(self.cfg.k)
        sparsity.threshold.fill_(self.topk_threshold.item())
        made = Crosscoder(
            self.cfg.d_in // n,
            self.cfg.d_sae,
            sparsity,
            n_models=n,
            normalizer=normalizer,
            code_norm=self.cfg.code_norm,
        ).to(self.W_dec)
        made.W_enc_rows.copy_(self.W_enc.T.unflatten(1, (n, -1)))
        made.W_dec.copy_(self.W_dec.unflatten(1, (n, -1)))
        made.b_enc.copy_(self.b_enc)
        made.b_dec.copy_(self.b_dec.view(n, -1))
        return made.eval()


# an assignment: importing again, or reloading, registers the class anew
SAE_TRAINING_CLASS_REGISTRY[ARCHITECTURE] = (CrosscoderTrainingSAE, CrosscoderTrainingConfig)
