"""Which crosscoder a finished part was made with."""

import hashlib
import json

from tl_crosscoder.dictionary.crosscoder import Crosscoder


def weights_sha256(crosscoder: Crosscoder) -> str:
    """sha256 over every parameter and buffer, the normaliser's included, and how they are used (k, code_norm, encoder, ...)."""
    used = {name: value for name, value in crosscoder.config.items() if name != "init"}
    digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    for name, value in sorted(crosscoder.state_dict().items()):
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
