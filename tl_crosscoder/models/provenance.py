"""Which model it was: name, revision, and a fingerprint of its config and weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_crosscoder.models.backends import Backend

_VOLATILE = {
    "_name_or_path",
    "architectures",
    "device",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_SAMPLES = 64


def describe_model(backend: Backend) -> dict[str, Any]:
    """Class, name, revision, precision and fingerprint of one model, JSON-able, without local paths."""
    config = config_of(backend)
    return {
        "class": type(module_of(backend)).__name__,
        "name": _name(config),
        "revision": getattr(config, "_commit_hash", None),
        "backend": type(backend).__name__,
        "adapter": adapter_state(backend),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "d_in": backend.d_in,
        "n_layers": backend.n_layers,
        "fingerprint": fingerprint(backend),
    }


def fingerprint(backend: Backend) -> str:
    """sha256 over the config and 64 values or so of every weight.

    A PEFT model with its adapter off has its base's fingerprint.
    """
    digest = hashlib.sha256(json.dumps(_settings(config_of(backend)), sort_keys=True, default=str).encode())
    for name, weight in sorted(_weights(module_of(backend), adapter_state(backend)).items()):
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(_sample(weight).numpy().tobytes())
    return digest.hexdigest()


def adapter_state(backend: Backend) -> str | None:
    """``on``, ``off`` or ``merged`` for a model with a PEFT adapter, None for one without."""
    stated = getattr(backend, "adapter", "on")
    return stated if stated == "merged" or _adapter_layers(module_of(backend)) else None


def weight_ids(backend: Backend) -> set[int]:
    """The identities of the weights: two models that share them all are one."""
    return {id(weight) for weight in module_of(backend).parameters()}


def module_of(backend: Backend) -> nn.Module:
    """The torch module that holds the weights."""
    return getattr(backend, "module", backend.model)


def config_of(backend: Backend) -> Any:
    return getattr(module_of(backend), "config", None) or getattr(backend.model, "cfg", None)


def _adapter_layers(module: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "adapter_layer_names")}


def _weights(module: nn.Module, adapter: str | None) -> dict[str, Tensor]:
    """Weights under the names they have without PEFT; those of an adapter that is off are left out."""
    added = tuple(
        f"{name}.{part}."
        for name, layer in _adapter_layers(module).items()
        for part in layer.adapter_layer_names
    )
    named = {}
    for name, weight in module.named_parameters():
        if adapter == "off" and name.startswith(added):
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        named[plain.removeprefix("base_model.model.")] = weight
    return named


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].to(device="cpu", dtype=torch.float32)


def _settings(config: Any) -> dict[str, Any]:
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return {key: value for key, value in settings.items() if key not in _VOLATILE}


def _name(config: Any) -> str | None:
    """The Hub name, or the last part of a local folder's path."""
    name = getattr(config, "_name_or_path", None) or getattr(config, "model_name", None)
    if not name:
        return None
    local = Path(name).is_absolute() or Path(name).exists() or name.startswith((".", "~"))
    return Path(name).name if local else name
