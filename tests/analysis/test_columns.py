import math

import pandas as pd
import pytest
import torch

from tests.analysis.crosscoders import random_acts, random_crosscoder
from tl_crosscoder.analysis.base import run
from tl_crosscoder.analysis.decoder_norms import classify, delta_norm, mirror_pairs, relative_norm
from tl_crosscoder.analysis.max_acts import MaxActs
from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.types import BASE, TUNED


def norms(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_delta_norm_follows_the_table_of_norm_ratios():
    # r = base / tuned: 0 -> 1, .1 -> .95, .2 -> .9, .5 -> .75, 1 -> .5, tuned 0 -> 0, and 0/0 is undefined
    got = delta_norm(norms([0, 1], [0.1, 1], [0.2, 1], [0.5, 1], [1, 1], [1, 0], [0, 0]))
    assert got[:6].tolist() == pytest.approx([1, 0.95, 0.9, 0.75, 0.5, 0])
    assert math.isnan(got[6])


def test_swapping_the_models_mirrors_delta_norm():
    n = torch.rand(20, 2, dtype=torch.float64)
    torch.testing.assert_close(delta_norm(n.flip(1)), 1 - delta_norm(n))


def test_delta_norm_above_nine_tenths_is_relative_norm_above_five_sixths():
    n = torch.rand(500, 2, dtype=torch.float64)
    assert torch.equal(delta_norm(n) > 0.9, relative_norm(n) > 5 / 6)


def test_mirror_pairs_are_counted_by_hand():
    """Latents 0, 1 tuned-only along axes 0 and 1; 2, 3 base-only along 0 and -1; 4 base-only along 0, never fired; 5 in both.

    Only 0 and 2 write one direction from either side: 1 and 3 are opposed, 4 is dead.
    """
    crosscoder = Crosscoder(3, 6, ReLU())
    with torch.no_grad():
        crosscoder.W_dec.zero_()
        for latent, model, axis, length in (
            (0, 1, 0, 2),
            (1, 1, 1, 1),
            (2, 0, 0, 1),
            (3, 0, 1, -1),
            (4, 0, 0, 1),
        ):
            crosscoder.W_dec[latent, model, axis] = length
        crosscoder.W_dec[5, :, 0] = 1
    assert mirror_pairs(crosscoder, [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]) == 1
    assert mirror_pairs(crosscoder, [1.0] * 6) == 2
    assert mirror_pairs(crosscoder, [0.0] + [1.0] * 5) == 0


def test_class_boundaries_are_strict_and_dead_overrides():
    deltas = [0.0, 0.0999, 0.1, 0.4, 0.5999, 0.6, 0.9, 0.9001, 1.0, 0.95]
    fired = [5.0] * 9 + [0.0]
    want = [
        "base_only",
        "base_only",
        "other",
        "shared",
        "shared",
        "other",
        "other",
        "tuned_only",
        "tuned_only",
        "dead",
    ]
    assert classify(deltas, fired) == want


@torch.no_grad()
def test_the_table_counts_and_maxima_equal_those_of_the_dense_codes():
    crosscoder, x = random_crosscoder(dead=[3]), random_acts(200)
    f = crosscoder.encode(x)
    table = latent_table(crosscoder, x.split(33))
    assert table["n_fired"].tolist() == (f > 0).sum(0).tolist()
    assert table["max_act"].tolist() == pytest.approx(f.amax(0).tolist())
    assert table["frequency"].tolist() == pytest.approx((f > 0).double().mean(0).tolist())
    assert table["class"][3] == "dead" and math.isnan(table["mean_act"][3])
    assert table.attrs["metrics"]["l0"] == pytest.approx((f > 0).sum(1).double().mean().item())


@torch.no_grad()
def test_difference_shares_sum_to_what_all_latents_write_of_the_difference():
    crosscoder, x = random_crosscoder(), random_acts(120)
    f, y = crosscoder.encode(x), crosscoder.normalizer.normalise(x)
    difference, rows = y[:, TUNED] - y[:, BASE], crosscoder.W_dec[:, TUNED] - crosscoder.W_dec[:, BASE]
    table = latent_table(crosscoder, x.split(50))
    want = [
        (f[:, [j]] * rows[j] * difference).sum().item() / difference.square().sum().item() for j in range(11)
    ]
    assert table["difference_share"].tolist() == pytest.approx(want)
    assert table["difference_peak"].tolist() == pytest.approx((f.amax(0) * rows.norm(dim=-1)).tolist())
    specific = (2 * table["delta_norm"] - 1).clip(lower=0)
    pd.testing.assert_series_equal(
        table["rank_score"], table["difference_share"] * specific, check_names=False
    )


@torch.no_grad()
def test_identical_models_have_no_difference_to_share():
    crosscoder = random_crosscoder(normalizer=False)
    x = random_acts()
    x[:, BASE] = x[:, TUNED]
    table = latent_table(crosscoder, [x])
    assert table["difference_share"].isna().all()
    assert math.isnan(table.attrs["metrics"]["fve_difference"])


@torch.no_grad()
def test_fve_uses_the_variance_over_all_tokens_and_not_a_mean_over_batches():
    crosscoder, x = random_crosscoder(), random_acts(90)
    x[:45] += 10  # the batch means differ: per-batch variances miss this spread
    y = crosscoder.normalizer.normalise(x)
    e = y - crosscoder.normalizer.normalise(crosscoder.decode(crosscoder.encode(x)))
    spread = lambda v: (v - v.mean(0)).square().sum((0, 2))
    want = 1 - spread(e) / spread(y)
    for chunks in ([x], x.split(45), x.split(7)):
        metrics = latent_table(crosscoder, chunks).attrs["metrics"]
        assert [metrics["fve_base"], metrics["fve_tuned"]] == pytest.approx(want.tolist())


@torch.no_grad()
def test_permuting_the_latents_permutes_the_table():
    crosscoder, x = random_crosscoder(), random_acts()
    before = latent_table(crosscoder, [x])
    order = torch.randperm(11)
    for p in (crosscoder.W_dec, crosscoder.W_enc_rows, crosscoder.b_enc):
        p.copy_(p[order].clone())
    after = latent_table(crosscoder, [x])
    expected = before.iloc[order.tolist()].reset_index(drop=True).rename_axis("latent")
    numeric = [c for c in before if c not in ("class", "top_position", "top_sequence")]
    pd.testing.assert_frame_equal(after[numeric], expected[numeric], rtol=1e-9)
    assert after["class"].tolist() == expected["class"].tolist()


def test_no_tokens_is_an_error_and_not_a_table_of_zeros():
    with pytest.raises(EmptyData, match="no tokens"):
        latent_table(random_crosscoder(), [])


class Placed:
    """A store in miniature: activations that know their sequence and position."""

    def __init__(self, x, length):
        self.x, self.length = x, length

    def __iter__(self):
        return iter(self.x.split(4096))

    def located(self, size):
        from types import SimpleNamespace

        where = torch.arange(len(self.x))
        for x, w in zip(self.x.split(size), where.split(size), strict=True):
            yield SimpleNamespace(x=x, sequence=w // self.length, position=w % self.length)


@torch.no_grad()
def test_top_examples_are_the_best_of_each_sequence_and_lead_back_to_their_token():
    crosscoder, x = random_crosscoder(dead=[5]), random_acts(6000)
    tops = MaxActs(crosscoder, n=4)
    run(crosscoder, Placed(x, 20), [tops])  # 300 sequences of 20 tokens, over three batches
    best, place = crosscoder.encode(x).view(300, 20, 11).max(1)
    for j in range(11):
        value, sequence = best[:, j].topk(4)
        if j == 5:
            assert (tops.top_sequences[j] == -1).all() and (tops.top_values[j] == 0).all()
            continue
        torch.testing.assert_close(tops.top_values[j].double(), value, rtol=1e-6, atol=1e-6)
        assert tops.top_sequences[j].tolist() == sequence.tolist()
        assert tops.top_positions[j].tolist() == place[sequence, j].tolist()
