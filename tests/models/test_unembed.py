"""What a model reads off a residual stream, through every library."""

import pytest
import torch
from test_backends import LIBRARIES, SEES, TOLERANCE, plain
from tiny_models import FAMILIES

from tl_crosscoder.models.backends import as_backend
from tl_crosscoder.models.backends.unembed import unembed

RESID = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_models_own_final_norm_unembedding_and_soft_cap(family):
    model = plain(family).model
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    with torch.no_grad():
        logits = model.lm_head(norm(RESID))
        if family == "gemma2":
            logits = 30 * torch.tanh(logits / 30)
    torch.testing.assert_close(unembed(plain(family), RESID), logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_library_agrees(library, family):
    seen = unembed(as_backend(SEES[library](FAMILIES[family]())), RESID)
    torch.testing.assert_close(seen, unembed(plain(family), RESID), atol=TOLERANCE, rtol=TOLERANCE)
