"""A crosscoder of models of unlike width in SAE-Lens: back as it was, and each model's half in that model's width."""

import pytest
import torch

from tests.hub.sae_lens_cases import HOOK, NEEDS_SAE_LENS, sae_lens
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.hub.sae_lens.convert import from_sae_lens, to_sae_lens
from tl_crosscoder.hub.sae_lens.views import as_sae, paired

pytestmark = NEEDS_SAE_LENS
WIDTHS = (3, 5)
SIDES = [(0, 3), (1, 5)]


@pytest.fixture
def crosscoder():
    sae_lens()
    sparsity = BatchTopK(2)
    sparsity.threshold.fill_(0.4)
    normalizer = Normalizer.fit([acts()], scale="per_model")
    return Crosscoder(5, 9, sparsity, normalizer=normalizer, init=Init(same=False), widths=WIDTHS).eval()


def acts(n=300, seed=0):
    """The narrower model's are a linear function of the wider one's."""
    generator = torch.Generator().manual_seed(seed)
    wide, map_ = (
        torch.randn(n, 5, generator=generator),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(9)),
    )
    return torch.stack([torch.nn.functional.pad(wide @ map_ + 0.2, (0, 2)), wide], 1)


def test_it_comes_back_with_its_widths(crosscoder):
    back, x = from_sae_lens(to_sae_lens(crosscoder)), acts(seed=1)
    assert back.widths == WIDTHS
    torch.testing.assert_close(back.encode(x), crosscoder.encode(x))
    torch.testing.assert_close(back(x).recon, crosscoder(x).recon)


@pytest.mark.parametrize(("model", "width"), SIDES)
def test_the_paired_half_has_the_width_of_its_model_and_reads_the_other_in_its_own(crosscoder, model, width):
    x = acts(seed=1)
    sae = paired(crosscoder, model, hook=HOOK)
    assert sae.cfg.d_in == width
    own, other = x[:, model, :width], x[:, 1 - model, : WIDTHS[1 - model]]
    with sae.bound(other):
        codes = sae.encode(own)
        torch.testing.assert_close(codes, crosscoder.encode(x).detach())
        torch.testing.assert_close(sae.decode(codes), crosscoder(x).recon[:, model, :width].detach())
    with pytest.raises(ShapeMismatch, match="of the other"), sae.bound(x[:, model, :2]):
        sae.encode(own)
    assert 0 < (codes > 0).float().mean() < 0.9


def test_an_approximation_guesses_from_one_width_to_the_other(crosscoder):
    x = acts(seed=1)
    with pytest.warns(UserWarning, match="an approximation"):
        sae = as_sae(crosscoder, 1, [x], encoder="linear", hook=HOOK)
    torch.testing.assert_close(sae.encode(x[:, 1]), crosscoder.encode(x).detach(), atol=1e-4, rtol=1e-4)
    assert sae.cfg.metadata.crosscoder_view["relative_error"] < 1e-4
    with pytest.warns(UserWarning, match="an approximation"):
        narrow = as_sae(crosscoder, 0, [x], encoder="mean", hook=HOOK)
    view = narrow.cfg.metadata.crosscoder_view
    assert narrow.cfg.d_in == 3
    assert 0 < view["relative_error"] < 1
    # decoding is exact: of the crosscoder's own codes it makes the crosscoder's reconstruction
    recon = crosscoder(x).recon[:, 0, :3].detach()
    torch.testing.assert_close(narrow.decode(crosscoder.encode(x).detach()), recon)
    with pytest.raises(ShapeMismatch, match="encoder='copy' wants models of one width"):
        as_sae(crosscoder, 1, [x], encoder="copy", hook=HOOK)
