"""Crosscoders of any format known here, read by SAE-Lens itself."""

from typing import Any

from torch import Tensor

from tl_crosscoder.hub.load import load, origin
from tl_crosscoder.hub.sae_lens.flat import flatten
from tl_crosscoder.hub.sae_lens.words import cfg
from tl_crosscoder.hub.source import Source


def sae_lens_converter(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """What SAE-Lens asks a converter for: config, weights and no sparsity, of a crosscoder that :func:`tl_crosscoder.load` reads.

    ``SAE.from_pretrained("owner/name", folder, dtype=..., converter=sae_lens_converter)``; the folder ``"."`` is the root.
    """
    if force_download:
        raise ValueError(
            "force_download: a file that tl_crosscoder published is verified wherever it lies; to download again, delete it from "
            "the cache (hf cache)"
        )
    from sae_lens.util import str_to_dtype

    overrides = cfg_overrides or {}
    dtype = str_to_dtype(overrides["dtype"]) if "dtype" in overrides else None
    crosscoder = load(Source(repo_id, None, "" if folder_name == "." else folder_name), dtype=dtype)
    flat = flatten(crosscoder)
    tensors = {name: tensor.detach().to(device) for name, tensor in flat.tensors().items()}
    return cfg(crosscoder, flat, origin(crosscoder).extra) | overrides, tensors, None
