import numpy as np
import pytest
import reference
import torch

from tl_crosscoder.dictionary.codes import Codes
from tl_crosscoder.dictionary.sparse_ops import decode_pairs, encode_pairs


def random_acts(batch=7, d_sae=11, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    acts = torch.rand(batch, d_sae, generator=generator, dtype=torch.float64)
    return acts * (torch.rand(batch, d_sae, generator=generator) < density)


def test_a_small_code_by_hand():
    codes = Codes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]]))
    assert codes.values.tolist() == [2, 1, 3]
    assert codes.latents.tolist() == [1, 0, 2]
    assert codes.offsets.tolist() == [0, 1, 1, 3]
    assert codes.tokens().tolist() == [0, 2, 2]
    assert (len(codes), codes.l0) == (3, 1.0)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_dense_and_sparse_are_inverses(density):
    acts = random_acts(density=density)
    assert torch.equal(Codes.from_dense(acts).dense(), acts)


def test_a_code_without_tokens_stays_one():
    codes = Codes.from_dense(torch.zeros(0, 5))
    assert (len(codes), codes.l0, codes.dense().shape) == (0, 0.0, (0, 5))


def test_only_keeps_the_chosen_latents_and_every_token():
    acts = random_acts()
    kept = Codes.from_dense(acts).only(torch.tensor([8, 2]))
    expected = torch.zeros_like(acts)
    expected[:, [2, 8]] = acts[:, [2, 8]]
    assert torch.equal(kept.dense(), expected)
    assert len(kept) == len(acts)


def test_with_values_changes_strengths_only():
    codes = Codes.from_dense(random_acts())
    assert torch.equal(codes.with_values(2 * codes.values).dense(), 2 * codes.dense())


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_sparse_decode_equals_the_loop_in_float64(density):
    acts, rows = random_acts(density=density), torch.randn(11, 2, 4, dtype=torch.float64)
    expected = reference.decode(acts.numpy(), rows.numpy(), np.zeros((2, 4)))
    np.testing.assert_allclose(Codes.from_dense(acts).decode(rows), expected, rtol=1e-13, atol=1e-13)


def test_sparse_decode_has_the_gradients_of_the_dense_product():
    acts, rows = random_acts(), torch.randn(11, 2, 4, dtype=torch.float64)
    dense = [acts.clone().requires_grad_(), rows.clone().requires_grad_()]
    sparse = [acts.clone().requires_grad_(), rows.clone().requires_grad_()]
    weights = torch.randn(7, 2, 4, dtype=torch.float64)
    (torch.einsum("bj,jmd->bmd", *dense) * weights).sum().backward()
    (Codes.from_dense(sparse[0]).decode(sparse[1]) * weights).sum().backward()
    torch.testing.assert_close(sparse[0].grad, dense[0].grad * (acts != 0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sparse[1].grad, dense[1].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 24, 1 << 20])
def test_encode_pairs_equals_the_dense_encoder_at_the_pairs(monkeypatch, chunk, dtype):
    monkeypatch.setattr("tl_crosscoder.dictionary.sparse_ops.CHUNK", chunk)
    x, rows, bias = (torch.randn(*s, dtype=torch.float64).to(dtype) for s in [(7, 2, 4), (11, 2, 4), (11,)])
    codes = Codes.from_dense(random_acts())
    dense = torch.einsum("bmd,jmd->bj", x.double(), rows.double()) + bias.double()
    at = encode_pairs(x, rows, bias, codes.pairs).double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(at, dense[codes.tokens(), codes.latents], rtol=tolerance, atol=tolerance)


def test_pair_products_pass_a_numerical_gradient_check():
    codes = Codes.from_dense(random_acts())
    values, rows, bias = (
        codes.values.clone(),
        torch.randn(11, 3, dtype=torch.float64),
        torch.randn(11, dtype=torch.float64),
    )
    x = torch.randn(7, 3, dtype=torch.float64)
    for tensor in (values, rows, bias, x):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: decode_pairs(v, w, codes.pairs), (values, rows))
    assert torch.autograd.gradcheck(lambda *args: encode_pairs(*args, codes.pairs), (x, rows, bias))
