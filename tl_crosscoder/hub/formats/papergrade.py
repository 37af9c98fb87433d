"""OpenInterpretability's BatchTopK model diffs: ``crosscoder_final.safetensors`` with a threshold for each latent."""

from typing import TYPE_CHECKING

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.hub.formats.base import NOT_STATED, Conventions, Format, Given
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.kissane import NAMES, axes

if TYPE_CHECKING:
    from tl_crosscoder.dictionary.crosscoder import Crosscoder

SCALES = ("norm_scale_A", "norm_scale_B")


class Papergrade(Format):
    """``pre = Σ_m (x_m - b_dec[m]) W_enc[m] + b_enc``, ``f = relu(pre)·[pre > threshold]``, ``x̂_m = f W_dec[:, m] + b_dec[m]``, on
    activations times ``norm_scale_A`` (base) and ``norm_scale_B`` (tuned).
    """

    name = "OpenInterpretability"

    def recognises(self, contents: Contents) -> bool:
        return (
            "W_enc" in contents and len(contents.shape("W_enc")) == 3 and "enc_mask" not in contents
            and "hook_names" not in contents.settings
            and ("threshold" in contents or any(name in contents.settings for name in SCALES))
        )  # fmt: skip

    def describe(self, contents: Contents) -> Conventions:
        settings = contents.settings
        if unknown := sorted(set(contents.tensors) - {*NAMES, "threshold"}):
            raise UnreadableFormat(
                f"{contents.weights}: unknown tensor {unknown[0]!r:.80}; this format has {', '.join(NAMES)}, threshold"
            )
        sizes, *_ = axes(contents)
        wants = {}
        scales = [settings.get(name) for name in SCALES]
        stated = all(isinstance(s, int | float) and not isinstance(s, bool) and s > 0 for s in scales)
        if not stated and any(s is not None for s in scales):
            raise CorruptFile(
                f"{contents.folder}: norm_scale_A and norm_scale_B are {scales!r:.80}, want two numbers above 0"
            )
        if stated and sizes["model"] != 2:
            raise UnreadableFormat(f"{contents.folder}: two norm scales for {sizes['model']} models")
        if not stated:
            wants["scale"] = (
                "cfg.json does not give norm_scale_A and norm_scale_B. Pass scale=(base's, tuned's)"
            )
        threshold = contents.values("threshold")
        said = "missing"
        if threshold is None:
            wants["threshold"] = (
                "the thresholds are missing; without them every positive activation would stay. Pass threshold= "
                "on the pre-activation"
            )
        else:
            if contents.shape("threshold") != (sizes["d_sae"],) or any(t != t for t in threshold):
                raise CorruptFile(
                    f"{contents.weights}: 'threshold' wants [d_sae={sizes['d_sae']}] numbers, got "
                    f"{list(contents.shape('threshold'))}"
                )
            if not any(t > 0 for t in threshold):
                wants["threshold"] = (
                    "no threshold is above 0, so that every positive activation would stay. Pass threshold= on "
                    "the pre-activation"
                )
            ordered = sorted(threshold)
            said = f"one a latent, on the raw pre-activation, {ordered[0]:.4g} to {ordered[-1]:.4g}"
        layer, k = settings.get("layer"), settings.get("k_batchtopk")
        names = [settings.get(name) for name in ("base_model", "chat_model")]
        return Conventions(
            self.name,
            sizes["d_in"], sizes["d_sae"], sizes["model"],
            models="A = base, B = tuned",
            sparsity=f"BatchTopK, k={k!r:.20}" if k is not None else "BatchTopK",
            b_dec="subtracted before encoding; folded into b_enc on reading",
            ranking="f · Σ_m ‖d_m‖ in training; at inference the pre-activation itself",
            threshold=said,
            normalisation=f"x · scale, scale = {scales[0]:.6g}, {scales[1]:.6g}" if stated else "missing",
            hook=f"output of layer {layer}: blocks.{layer}.hook_resid_post" if isinstance(layer, int) else NOT_STATED,
            language_models=", ".join(f"{name:.80}" for name in names) if all(isinstance(n, str) for n in names) else NOT_STATED,
            wants=wants,
            claims=_claims(contents),
        )  # fmt: skip

    def read(self, contents: Contents, given: Given) -> "Crosscoder":
        import torch

        from tl_crosscoder.dictionary.sparsity import Threshold
        from tl_crosscoder.hub.formats.assemble import Layout, build, fold_given, read_parts
        from tl_crosscoder.hub.formats.opened import open_weights
        from tl_crosscoder.hub.tensors import read

        weights, (sizes, enc, dec) = open_weights(contents), axes(contents)
        parts = read_parts(weights, Layout("W_enc", enc, "W_dec", dec, "b_enc", "b_dec"), given.dtype)
        parts.subtract_b_dec()
        if given.threshold is not None:
            threshold = torch.full((sizes["d_sae"],), given.threshold, dtype=parts.enc.dtype)
        else:  # a latent that never fired may have a threshold of Inf: the largest number is as good
            threshold = read(weights, "threshold", parts.enc.dtype, finite=False).clamp_max(
                torch.finfo(parts.enc.dtype).max
            )
        if given.scale is not None:
            mean, scale = fold_given(parts, given)
        else:
            mean, scale = (
                None,
                torch.tensor([contents.settings[name] for name in SCALES], dtype=torch.float64),
            )
        return build(parts, Threshold.of(threshold), mean=mean, scale=scale)


def _claims(contents: Contents) -> dict[str, float]:
    """Of the figures that a training wrote down, those that can be measured again."""
    metrics = contents.settings.get("val_metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    names = {
        "l0": "l0",
        "L0": "l0",
        "ve_a": "fve_base",
        "ve_base": "fve_base",
        "ve_b": "fve_tuned",
        "ve_chat": "fve_tuned",
        "explained_variance": "fve",
    }
    found = {
        ours: float(metrics[name])
        for name, ours in names.items()
        if isinstance(metrics.get(name), int | float)
    }
    k = contents.settings.get("k_batchtopk")
    return found if "l0" in found or not isinstance(k, int | float) else {**found, "l0": float(k)}
