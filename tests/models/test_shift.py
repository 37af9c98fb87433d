import pytest
import torch

from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.models.shift import shift


def test_each_sequence_gets_its_own_vector_where_the_mask_is():
    acts, vectors = torch.zeros(2, 3, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    mask = torch.tensor([[False, True, True], [True, False, True]])
    moved = shift(vectors, mask)(acts)
    assert moved.tolist() == [[[0, 0], [1, 0], [1, 0]], [[0, 2], [0, 0], [0, 2]]]
    assert (acts == 0).all()


def test_new_tokens_are_shifted_and_nothing_else_may_differ_in_shape():
    edit = shift(torch.ones(2), torch.zeros(2, 3, dtype=torch.bool))
    assert (edit(torch.zeros(2, 1, 2)) == 1).all() and (edit(torch.zeros(2, 3, 2)) == 0).all()
    with pytest.raises(ShapeMismatch, match="mask"):
        edit(torch.zeros(2, 4, 2))
    with pytest.raises(ShapeMismatch, match="vectors"):
        shift(torch.ones(3, 2))(torch.zeros(2, 3, 2))


def test_a_vector_of_zeros_changes_no_bit_in_any_precision():
    for dtype in (torch.float32, torch.bfloat16):
        acts = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(shift(torch.zeros(4))(acts), acts)
