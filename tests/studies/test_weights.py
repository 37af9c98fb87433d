"""Which crosscoder a finished part was made with: one whose codes differ is another."""

import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.sparsity import TopK
from tl_crosscoder.studies.weights import weights_sha256


def with_weights_of(plain, k=2, **settings):
    other = Crosscoder(4, 8, TopK(k), **settings)
    with torch.no_grad():
        for name, value in plain.named_parameters():
            other.get_parameter(name).copy_(value)
    return other


@pytest.mark.parametrize("settings", [{"k": 4}, {"encoder": "mean"}, {"code_norm": "l2"}])
def test_equal_weights_that_give_other_codes_have_another_hash(settings):
    torch.manual_seed(0)
    plain, x = Crosscoder(4, 8, TopK(2), init=Init(seed=1)), torch.randn(2000, 2, 4)
    with torch.no_grad():
        plain.W_dec[:4, 1] *= 3
        plain.b_enc.normal_()
    other = with_weights_of(plain, **settings)
    assert not torch.equal(plain.encode(x), other.encode(x))
    assert weights_sha256(plain) != weights_sha256(other)


def test_where_the_weights_started_makes_no_difference():
    plain = Crosscoder(4, 8, TopK(2), init=Init(seed=1))
    assert weights_sha256(plain) == weights_sha256(with_weights_of(plain, init=Init(seed=2)))


def test_one_changed_weight_does():
    plain = Crosscoder(4, 8, TopK(2))
    before = weights_sha256(plain)
    with torch.no_grad():
        plain.b_dec[0, 0] += 1e-6
    assert weights_sha256(plain) != before
