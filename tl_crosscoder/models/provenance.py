"""Which model it was: name, revision, and a fingerprint of its config and weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "device",
    "use_cache",
}
_SAMPLES = 64


def describe_model(backend: Any) -> dict[str, Any]:
    """Class, name, revision, dtype, attention and fingerprint of one model, JSON-able and without local paths."""
    module = getattr(backend, "module", backend.model)
    config = getattr(module, "config", None) or getattr(backend.model, "cfg", None)
    return {
        "class": type(module).__name__,
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


def fingerprint(backend: Any) -> str:
    """sha256 over the config and a sample of every weight; a PEFT model with its adapter off has its base's."""
    module = getattr(backend, "module", backend.model)
    config = getattr(module, "config", None) or getattr(backend.model, "cfg", None)
    digest = hashlib.sha256(json.dumps(_settings(config), sort_keys=True, default=str).encode())
    for name, weight in sorted(_weights(module, adapter_state(backend) == "off")):
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(_sample(weight).numpy().tobytes())
    return digest.hexdigest()


def adapter_state(backend: Any) -> str | None:
    """``on``, ``off`` or ``merged`` for a model that has a PEFT adapter, None for one that never had."""
    if getattr(backend, "merged", False):
        return "merged"
    return (
        getattr(backend, "adapter", "on")
        if hasattr(getattr(backend, "module", None), "peft_config")
        else None
    )


def _weights(module: nn.Module, without_adapter: bool) -> list[tuple[str, Tensor]]:
    named = []
    for name, weight in module.named_parameters():
        if without_adapter and ("lora_" in name or "modules_to_save" in name):
            continue
        named.append((name.removeprefix("base_model.model.").replace(".base_layer.", "."), weight))
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
    return (
        Path(name).name if Path(name).is_absolute() or Path(name).exists() or name.startswith(".") else name
    )
