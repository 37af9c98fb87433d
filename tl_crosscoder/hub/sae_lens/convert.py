"""Between this library's crosscoder and an SAE of SAE-Lens, in memory."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.hub.sae_lens.extra import needs_sae_lens
from tl_crosscoder.hub.sae_lens.flat import Flat, flatten
from tl_crosscoder.hub.sae_lens.unflat import Origin, unflatten
from tl_crosscoder.hub.sae_lens.words import cfg, origin

if TYPE_CHECKING:
    from sae_lens import SAE

    from tl_crosscoder.hub.sae_lens.native.joint_sae import CrosscoderSAE, CrosscoderTopKSAE


#: What to do about a setting under which an SAE is no function of the plain activations.
REMEDIES = {
    "expected_average_only_in": "fold the factor it was trained with: sae.fold_activation_norm_scaling_factor(factor)",
    "covariance_whitening": "fold the whitening it was trained with: sae.fold_activation_whitening(mean, matrix, inverse)",
    "hook_z": "sae.turn_off_forward_pass_hook_z_reshaping(); sae.cfg.reshape_activations = 'none'; it then reads flat activations",
}
BY_TOKEN = (
    "each token is scaled by itself, which no crosscoder does: scale the activations before it reads them, and set "
    "sae.cfg.normalize_activations = 'none'"
)


def to_sae_lens(
    crosscoder: Crosscoder, *, hook: str | None = None, extra: dict[str, Any] | None = None
) -> "CrosscoderSAE | CrosscoderTopKSAE":
    """The crosscoder as an SAE of SAE-Lens on the raw activations of both models side by side, base first.

    The code norm is folded into the thresholds (a TopK's into the weights, and its codes come out weighed, f · norm), then the
    normaliser into the weights.  ``extra`` is what ``save`` keeps with a crosscoder: ``read_config(directory)["extra"]``; ``hook``
    names the place alone.  Raises ValueError, with the reason, for a crosscoder that SAE-Lens cannot express.
    """
    needs_sae_lens()
    from tl_crosscoder.hub.sae_lens.native.joint_sae import JointSAE

    extra = dict(extra or {})
    if hook is not None:
        extra["pair"] = {**extra.get("pair", extra), "hook": hook}
    flat = flatten(crosscoder)
    config = cfg(crosscoder, flat, extra)
    kind = JointSAE.get_sae_class_for_architecture(config["architecture"])
    return assembled(kind, config, flat.tensors())


def from_sae_lens(sae: "SAE", *, n_models: int | None = None) -> Crosscoder:
    """The crosscoder that computes what an SAE of the concatenated activations does; its weights are copies, and it is folded.

    ``n_models`` is for an SAE that does not say of how many models it is, such as one that SAE-Lens itself trained.  Raises
    ValueError, with the remedy, for an SAE that is not ``jumprelu``, ``topk`` or ``standard``, or that rescales what it reads.
    """
    flat, block = flat_of(sae), sae.cfg.metadata.crosscoder
    if isinstance(block, dict):
        if n_models not in (None, block.get("n_models")):
            raise ValueError(
                f"n_models={n_models}, but this SAE says that it is of {block.get('n_models')!r:.40}"
            )
        return unflatten(flat, origin(block, flat.b_dec.dtype))
    if n_models is None:
        raise ValueError(
            "this SAE does not say of how many models its activations are (no metadata.crosscoder); pass n_models=2 if they "
            "are base and tuned side by side"
        )
    return unflatten(flat, Origin(n_models))


@torch.no_grad()
def flat_of(sae: "SAE") -> Flat:
    """The weights of an SAE of SAE-Lens, with what its settings do to them folded in."""
    config, kind = sae.cfg, sae.cfg.architecture()
    if kind not in ("jumprelu", "topk", "standard") or hasattr(sae, "training_forward_pass"):
        raise ValueError(
            f"an SAE of kind {type(sae).__name__} ({kind}) has no counterpart here; wanted an inference SAE that is 'jumprelu', "
            "'topk' or 'standard' (of one in training: save_inference_model)"
        )
    for name in ("normalize_activations", "reshape_activations"):
        if (found := getattr(config, name)) != "none":
            raise ValueError(f"this SAE has {name}={found!r}, wanted 'none'; {REMEDIES.get(found, BY_TOKEN)}")
    weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in sae.named_parameters()}
    if further := sorted(set(weights) - {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}):
        raise ValueError(
            f"a {type(sae).__name__} also has {further[0]}, for which a crosscoder has no place; convert the crosscoder that it is "
            "a part of"
        )
    if config.apply_b_dec_to_input:
        shift = weights["b_dec"].double() @ weights["W_enc"].double()
        weights["b_enc"] = (weights["b_enc"].double() - shift).to(weights["b_enc"])
    if kind == "topk" and getattr(config, "rescale_acts_by_decoder_norm", False):
        norms = weights["W_dec"].norm(dim=-1)
        weights["W_enc"] *= norms
        weights["b_enc"] *= norms
        weights["W_dec"] /= norms.where(norms > 0, 1)[:, None]
    if kind == "standard":
        weights["threshold"] = torch.zeros_like(weights["b_enc"])
    return Flat(**weights, k=getattr(config, "k", None))


def assembled(kind: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """An SAE of this class with these tensors, which are not copied."""
    device = tensors["W_dec"].device
    sae = kind(kind.get_sae_config_class_for_architecture("").from_dict({**config, "device": "meta"}))
    sae.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()}, assign=True)
    return sae.to(device)
