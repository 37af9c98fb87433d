"""Small crosscoders with random weights, and activations to try them on."""

import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU


def random_crosscoder(d_in=6, d_sae=11, *, seed=0, threshold=0.4, dead=(), normalizer=True) -> Crosscoder:
    """Independent decoders, biases everywhere, a centred and scaled normaliser with one scale a model, some latents dead."""
    g = torch.Generator().manual_seed(seed)
    parts = Normalizer(torch.randn(2, d_in, generator=g), torch.tensor([0.7, 1.3])) if normalizer else None
    sparsity = BatchTopK(3) if threshold is not None else ReLU()
    crosscoder = Crosscoder(
        d_in, d_sae, sparsity, normalizer=parts, init=Init(same=False, seed=seed)
    ).double()
    with torch.no_grad():
        for p in (crosscoder.W_dec, crosscoder.W_enc_rows, crosscoder.b_enc, crosscoder.b_dec):
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
        crosscoder.b_enc[list(dead)] = -1e6
        if threshold is not None:
            crosscoder.sparsity.threshold.fill_(threshold)
    return crosscoder.eval()


def random_acts(n=50, d_in=6, *, seed=1) -> torch.Tensor:
    return torch.randn(n, 2, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
