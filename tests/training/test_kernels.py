"""What a training says that asks for kernels it cannot have; the kernels themselves: test_triton.py."""

import sys

import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparse_ops import bag, summed_by, torch_bag
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train


def test_without_triton_the_error_says_how_to_get_it_before_any_work(monkeypatch):
    for name in ("dictionary.triton_bag", "training.triton_adam"):
        monkeypatch.delitem(sys.modules, f"tl_crosscoder.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    crosscoder = Crosscoder(4, 8, BatchTopK(2))
    before = crosscoder.W_dec.detach().clone()
    with pytest.raises(
        ImportError, match=r"kernels='triton' needs Triton .*pip install triton; or take kernels='torch'"
    ):
        train(crosscoder, [torch.randn(8, 2, 4)] * 2, config=TrainConfig(2, kernels="triton", progress=False))
    assert torch.equal(crosscoder.W_dec, before)


def test_sums_are_by_another_function_within_the_block_only():
    pairs = torch.tensor([0, 1, 1]), torch.eye(2), torch.tensor([0, 1, 3]), torch.tensor([1.0, 2.0, 3.0])
    expected = torch_bag(*pairs)
    with pytest.raises(KeyError), summed_by(lambda *given: -torch_bag(*given)):
        assert torch.equal(bag(*pairs), -expected)
        raise KeyError
    assert torch.equal(bag(*pairs), expected)
