"""The crosscoder of some latents alone."""

import pytest
import torch

from tests.analysis.crosscoders import random_acts, random_crosscoder
from tl_crosscoder import Crosscoder, GroupMax, Init, JumpReLU, Normalizer, ReLU, TopK
from tl_crosscoder.dictionary.sparsity.threshold import Threshold

IDS = torch.tensor([7, 0, 3])


def of_kind(sparsity) -> Crosscoder:
    torch.manual_seed(0)
    normalizer = Normalizer(torch.randn(2, 6), torch.tensor([0.5, 2.0]))
    made = Crosscoder(6, 11, sparsity, normalizer=normalizer, init=Init(norm=1.0, same=False)).eval()
    torch.nn.init.normal_(made.b_enc)
    torch.nn.init.normal_(made.b_dec)
    return made


KINDS = {
    "batch_topk": lambda: random_crosscoder(threshold=0.2).float(),
    "batch_topk folded": lambda: random_crosscoder(threshold=0.2).float().folded(),
    "relu": lambda: of_kind(ReLU()),
    "jumprelu": lambda: of_kind(JumpReLU(init_threshold=0.7)),
    "threshold": lambda: of_kind(Threshold.of(torch.linspace(0, 2, 11))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_some_latents_alone_have_the_codes_rows_and_norms_that_they_have_among_all(kind):
    whole, x = KINDS[kind]().eval(), random_acts(200).float()
    few = whole.restricted(IDS)
    codes = whole.encode(x)[:, IDS]
    assert (codes > 0).any() and (codes == 0).any()
    torch.testing.assert_close(few.encode(x), codes, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(few.raw_rows(), whole.raw_rows()[IDS], rtol=0, atol=0)
    torch.testing.assert_close(few.decoder_norms(), whole.decoder_norms()[IDS], rtol=0, atol=0)
    torch.testing.assert_close(
        few.decode(torch.zeros(1, 3)), whole.decode(torch.zeros(1, 11)), rtol=0, atol=0
    )


def test_it_is_a_copy_that_does_not_train():
    whole = KINDS["batch_topk"]()
    few = whole.restricted(IDS)
    few.W_dec.data.zero_()
    few.sparsity.threshold.fill_(9)
    assert whole.W_dec[IDS].norm() > 0 and whole.sparsity.threshold < 9
    assert not few.training and not any(weight.requires_grad for weight in few.parameters())


@pytest.mark.parametrize("sparsity", [TopK(2), GroupMax(2)], ids=["TopK", "GroupMax"])
def test_latents_that_compete_cannot_be_taken_alone(sparsity):
    whole = Crosscoder(6, 12, sparsity)
    with pytest.raises(ValueError, match=f"{type(sparsity).__name__} lets latents compete"):
        whole.restricted(IDS)
