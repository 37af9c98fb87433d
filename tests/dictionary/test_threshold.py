import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU, Threshold


def crosscoder(threshold, code_norm="sum"):
    made = Crosscoder(6, len(threshold), Threshold.of(threshold), code_norm=code_norm).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


@pytest.mark.parametrize("code_norm", ["sum", "l2", "none"])
def test_a_latent_is_active_above_its_own_threshold_whatever_its_norm(code_norm):
    # one latent with a threshold below 0, which is as 0; one with 0; one that nothing passes
    made = crosscoder(torch.tensor([-1.0, 0.0, 0.5, 2.0, 1e30]).double(), code_norm)
    x = torch.randn(200, 2, 6, dtype=torch.float64)
    pre = torch.einsum("bmi,mij->bj", x, made.W_enc) + made.b_enc
    wanted = pre.relu() * (pre > made.sparsity.threshold)
    assert torch.allclose(made.encode(x), wanted, atol=1e-12)
    assert (wanted[:, :4] > 0).any(0).all()
    assert not wanted[:, 4].any()


def test_thresholds_of_zero_are_relu():
    made, x = crosscoder(torch.zeros(5).double()), torch.randn(50, 2, 6, dtype=torch.float64)
    codes = made.encode(x)
    made.sparsity = ReLU()
    assert torch.equal(codes, made.encode(x))


def test_thresholds_that_were_never_set_are_refused():
    with pytest.raises(RuntimeError, match="no thresholds yet"):
        Crosscoder(6, 5, Threshold()).eval().encode(torch.randn(3, 2, 6))


def test_thresholds_of_another_dictionary_are_refused():
    with pytest.raises(ValueError, match="thresholds for 4 latents, not for d_sae=5"):
        Crosscoder(6, 5, Threshold.of(torch.zeros(4)))
