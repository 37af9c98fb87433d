import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_crosscoder.errors import EmptyData, ShapeMismatch
from tl_crosscoder.models.tokens import TokenBatch

PAD = 9


def ragged(lengths, side="right"):
    """Row r counts 1, 2, ... lengths[r]; PAD also occurs as a real token, at the end of each row."""
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = torch.tensor([*range(1, length), PAD])
        mask[row, place] = True
    return TokenBatch.from_ids(ids, mask, special_ids=(1,))


def test_a_padding_id_inside_the_text_is_a_real_token():
    batch = ragged([3, 5])
    assert batch.lengths.tolist() == [3, 5]
    assert batch.ids[0, 2] == PAD and batch.attention_mask[0, 2] and not batch.attention_mask[0, 3]


def test_positions_count_from_the_first_real_token_on_either_side():
    assert ragged([2, 4], "left").position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert ragged([2, 4], "right").position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]


def test_first_is_the_first_real_token_and_not_column_zero():
    assert ragged([2, 4], "left").first.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert ragged([2, 4], "right").first[:, 0].tolist() == [True, True]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_padding_to_a_side_keeps_tokens_flags_and_order(lengths):
    right, left = ragged(lengths, "right"), ragged(lengths, "left")
    for there in (right.padded("left"), left.padded("left")):
        assert torch.equal(there.attention_mask, left.attention_mask)
        assert torch.equal(there.ids[there.attention_mask], left.ids[left.attention_mask])
        assert torch.equal(there.special, left.special)
        assert torch.equal(there.position_ids, left.position_ids)
    back = right.padded("left").padded("right")
    assert torch.equal(back.ids, right.ids) and torch.equal(back.special, right.special)


def test_special_ids_flag_real_tokens_only():
    batch = TokenBatch.from_ids(torch.tensor([[1, 5, 1, 1]]), torch.tensor([[1, 1, 1, 0]]), special_ids=(1,))
    assert batch.special.tolist() == [[True, False, True, False]]


def test_rows_are_taken_in_the_order_asked_for():
    batch = ragged([1, 2, 3])
    assert batch.rows([2, 0]).lengths.tolist() == [3, 1]
    assert batch.rows(slice(1, None)).lengths.tolist() == [2, 3]
    assert len(batch.rows(torch.tensor([1]))) == 1


def test_a_row_without_real_tokens_is_refused_by_number():
    with pytest.raises(EmptyData, match="row 1 has no real token"):
        TokenBatch.from_ids(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [0, 0, 0]]))


def test_a_mask_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ShapeMismatch, match=r"ids are \[2, 3\], the mask \[2, 4\]"):
        TokenBatch.from_ids(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4))
