import pytest
import torch

from tl_crosscoder.dictionary import row_grads
from tl_crosscoder.dictionary.row_grads import PairPart, RowGrads, RowPart
from tl_crosscoder.dictionary.sparse_ops import Pairs

BATCH, D_SAE, N = 24, 50, 70


def dense_and_parts(dtype=torch.float64):
    """Weights of pairs as a matrix, activations, and the two collected; some latents have no pair."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(BATCH, D_SAE, generator=generator, dtype=dtype)
    acts *= torch.rand(BATCH, D_SAE, generator=generator) < 0.4
    acts[:, ::7] = 0
    x = torch.randn(BATCH, N, generator=generator, dtype=dtype)
    tokens, latents = acts.nonzero(as_tuple=True)
    offsets = torch.searchsorted(tokens, torch.arange(BATCH + 1))
    grads = RowGrads()
    grads.add_pairs(acts[tokens, latents], x, Pairs(tokens, latents, offsets, D_SAE))
    return acts, x, grads


@pytest.fixture(params=["whole", "in panels"])
def panels(request, monkeypatch):
    """Of 32, 32 and 6 columns."""
    if request.param == "in panels":
        monkeypatch.setattr(row_grads, "MANY", 0)
        monkeypatch.setattr(row_grads, "PANEL_BYTES", 40 * BATCH * 8)
    return 1 if request.param == "whole" else 3


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_blocks_and_their_square_are_those_of_the_dense_product(monkeypatch, panels, block):
    monkeypatch.setattr(row_grads, "BLOCK_BYTES", block)
    acts, x, grads = dense_and_parts()
    wanted = acts.T @ x
    assert len(grads.pairs[0]._panels) == panels
    for start, stop in ((0, D_SAE), (7, 8), (13, 40), (49, 50)):
        found = grads.block(start, stop, torch.zeros(D_SAE, N, dtype=torch.float64))
        torch.testing.assert_close(found, wanted[start:stop], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grads.square(), wanted.square().sum(), rtol=1e-12, atol=0.0)


def test_panels_change_no_bit(monkeypatch):
    _, x, grads = dense_and_parts(torch.float32)
    part = grads.pairs[0]
    whole = part.block(0, D_SAE)
    monkeypatch.setattr(row_grads, "MANY", 0)
    monkeypatch.setattr(row_grads, "PANEL_BYTES", 16 * BATCH * 4)
    again = PairPart(x, part.tokens, part.weights, part.offsets)
    assert torch.equal(whole, again.block(0, D_SAE))
    assert len(again._panels) == 5


def test_a_gradient_that_is_more_than_pairs_has_no_square_of_its_own():
    _, _, grads = dense_and_parts()
    grads.rows.append(RowPart(torch.tensor([3]), torch.ones(1, N, dtype=torch.float64)))
    assert grads.square() is None
    assert RowGrads().square() is None


def test_many_tokens_are_no_panel(monkeypatch):
    monkeypatch.setattr(row_grads, "MANY", 0)
    monkeypatch.setattr(row_grads, "PANEL_BYTES", 15 * BATCH * 8)
    _, _, grads = dense_and_parts()
    assert len(grads.pairs[0]._panels) == 1
