"""Which crosscoder a finished part was made with."""

import hashlib

from tl_crosscoder.dictionary.crosscoder import Crosscoder


def weights_sha256(crosscoder: Crosscoder) -> str:
    """sha256 over every parameter and buffer, the normaliser's included."""
    digest = hashlib.sha256()
    for name, value in sorted(crosscoder.state_dict().items()):
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
