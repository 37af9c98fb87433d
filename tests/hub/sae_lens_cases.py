"""Crosscoders of every kind that SAE-Lens can hold, and activations for them."""

import warnings
from importlib.util import find_spec

import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, ReLU, Split, TopK

HOOK = "blocks.1.hook_resid_post"
D_IN, D_SAE = 5, 9
KINDS = {
    "batch_topk": lambda: BatchTopK(2),
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "topk": lambda: TopK(3),
    "split": lambda: Split(4, BatchTopK(1), BatchTopK(2)),
}
NEEDS_SAE_LENS = pytest.mark.skipif(
    find_spec("sae_lens") is None, reason="needs SAE-Lens, which wants transformer-lens below 4"
)


def made(kind="batch_topk", *, code_norm="sum", encoder="sum", dtype=torch.float32, seed=0, exact=False):
    """Random weights; ``exact``: quarters and powers of two, so that sums come out the same in any order."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        if exact:
            return torch.randint(-4, 5, shape, generator=generator) / 4
        return torch.randn(shape, generator=generator)

    normalizer = Normalizer(4 * drawn(2, D_IN), torch.tensor([0.5, 2.0] if exact else [0.3, 1.7]))
    crosscoder = Crosscoder(
        D_IN, D_SAE, KINDS[kind](), normalizer=normalizer, code_norm=code_norm, encoder=encoder
    )
    with torch.no_grad():
        for parameter in (crosscoder.W_enc_rows, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec):
            parameter.copy_(drawn(*parameter.shape))
        for part in crosscoder.modules():
            if isinstance(part, BatchTopK):
                part.threshold.fill_(0.75)
            if isinstance(part, JumpReLU):
                part.log_threshold.copy_(torch.rand(D_SAE, generator=generator))
    return crosscoder.to(dtype).eval()


def acts(n=50, *, exact=False, seed=1, dtype=torch.float32):
    """Raw activations [batch, model, d_in]."""
    generator = torch.Generator().manual_seed(seed)
    if exact:
        return torch.randint(-8, 9, (n, 2, D_IN), generator=generator).to(dtype)
    return (3 * torch.randn(n, 2, D_IN, generator=generator)).to(dtype)


def sae_lens():
    """The library, imported without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens

        return sae_lens
