"""What a SAE-Lens folder says about itself: ``cfg.json``, and in it the block ``metadata.crosscoder``."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tl_crosscoder import __version__
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import SPARSITIES, BatchTopK, Sparsity
from tl_crosscoder.hub.sae_lens.flat import Flat
from tl_crosscoder.hub.sae_lens.unflat import Origin

#: The SAE-Lens whose layout is written.  Without a version in the metadata it would take the file for an old one and drop the rest.
LAYOUT = "6.54.12"
SCHEMA = 1
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: SAE-Lens wants them and a crosscoder does not know them unless told; ``assumed`` names those that nobody told.
ASSUMED = {"prepend_bos": True, "context_size": 1024}
UNKNOWN = "unknown"


def cfg(crosscoder: Crosscoder, flat: Flat, extra: dict[str, Any]) -> dict[str, Any]:
    """The contents of ``cfg.json``; ``extra`` is what ``save`` keeps with a crosscoder."""
    pair = extra.get("pair", extra)
    base, tuned = (_model(pair.get(side)) for side in ("base", "tuned"))
    told = _begins_with_bos(extra) | {name: extra[name] for name in ASSUMED if name in extra}
    hook = str(pair.get("hook") or UNKNOWN)
    return {
        "architecture": "topk" if flat.k else "jumprelu",
        "d_in": len(flat.b_dec),
        "d_sae": len(flat.b_enc),
        "dtype": str(flat.b_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": flat.k, "rescale_acts_by_decoder_norm": False} if flat.k else {}),
        "metadata": {
            "sae_lens_version": LAYOUT,
            "sae_lens_training_version": None,
            "model_name": full_name(tuned),
            "hook_name": hook,
            **ASSUMED,
            **told,
            "crosscoder": block(
                crosscoder.n_models,
                crosscoder.d_in,
                "f * code norm" if flat.k else "f",
                {
                    "models": [base, tuned] if crosscoder.n_models == 2 else [],
                    "hook_names": [hook] * crosscoder.n_models,
                    "assumed": sorted(set(ASSUMED) - set(told)),
                    **_origin(crosscoder),
                },
            ),
        },
    }


def block(n_models: int, d_in: int, codes: str, told: dict[str, Any]) -> dict[str, Any]:
    """``metadata.crosscoder``; what is not told is what a crosscoder on raw activations without a code norm has."""
    return {
        "schema": SCHEMA,
        "library": f"tl-crosscoder {__version__}",
        "layout": "flat index = model * d_in + i; model 0 base, 1 tuned",
        "n_models": n_models,
        "d_in": d_in,
        "codes": codes,
        "code_norm": "none",
        "model_scales": [1.0] * n_models,
        "model_means": None,
        "thresholds": None,
        "partition": asdict(Partition()),
        **told,
    }


def origin(told: dict[str, Any], dtype: torch.dtype) -> Origin:
    """How weights of this precision came about, by the block ``metadata.crosscoder``.

    A broken block raises KeyError, TypeError, ValueError, AttributeError or RuntimeError.
    """
    if told["schema"] != SCHEMA:
        raise ValueError(
            f"metadata.crosscoder has the schema {told['schema']!r}, this library reads {SCHEMA}; upgrade tl-crosscoder"
        )
    n, d_in = told["n_models"], told["d_in"]
    mean = torch.zeros(n, d_in, dtype=dtype)
    if told["model_means"] is not None:
        mean = torch.tensor(told["model_means"], dtype=dtype)
    scale = torch.tensor(told["model_scales"], dtype=dtype)
    if mean.shape != (n, d_in) or scale.shape != (n,):
        raise ValueError("model_means or model_scales is not one for each model")
    sparsity = SPARSITIES.build(told["sparsity"]).to(dtype)
    if told["thresholds"] is None:
        sparsity = None
    else:
        for part, threshold in zip(_batch_topks(sparsity), told["thresholds"], strict=True):
            part.threshold.fill_(threshold)
    return Origin(
        n_models=n,
        sparsity=sparsity,
        code_norm=told["code_norm"],
        units=Normalizer(mean, scale),
        partition=Partition(**told["partition"]),
        widths=told.get("widths"),
    )


def _origin(crosscoder: Crosscoder) -> dict[str, Any]:
    units, sparsity = crosscoder.units or crosscoder.normalizer, crosscoder.sparsity
    config = crosscoder.config
    return {
        "code_norm": crosscoder.code_norm,
        "model_scales": numbers(units.scale),
        "model_means": numbers(units.mean) if units.mean.any() else None,
        "sparsity": SPARSITIES.describe(sparsity),
        "thresholds": [numbers(part.threshold) for part in _batch_topks(sparsity)],
        "partition": config["partition"],
        **({"widths": config["widths"]} if "widths" in config else {}),
    }


def _batch_topks(sparsity: Sparsity) -> list[BatchTopK]:
    return [part for part in sparsity.modules() if isinstance(part, BatchTopK)]


def numbers(tensor: Tensor) -> Any:
    """As JSON, with just the digits that tell each number from its neighbours in the tensor's precision."""
    if tensor.ndim:
        return [numbers(part) for part in tensor]
    return float(str(tensor.numpy())) if tensor.dtype != torch.bfloat16 else tensor.item()


def full_name(model: dict[str, Any]) -> str:
    """With its adapter: the name alone would load the other model."""
    return " + ".join(model[key] for key in ("name", "adapter_name") if model.get(key))


def _begins_with_bos(extra: dict[str, Any]) -> dict[str, bool]:
    """What the capture counted, where it is kept."""
    capture = extra.get("capture")
    bos = capture.get("bos") if isinstance(capture, dict) else None
    opened = bos.get("sequences_opened_by_it") if isinstance(bos, dict) else None
    return {"prepend_bos": opened > 0} if type(opened) is int else {}


def _model(described: Any) -> dict[str, Any]:
    """From a description of :meth:`ModelPair.description`, or a name."""
    if isinstance(described, dict):
        kept = {key: described.get(key) for key in ("revision", "adapter_name", "fingerprint")}
        return {"name": str(described.get("name") or UNKNOWN), **{k: v for k, v in kept.items() if v}}
    return {"name": str(described or UNKNOWN)}
