import math

import pytest
import torch

from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.errors import EmptyData, NonFiniteActs


def acts(n=500, seed=0):
    """Two models with different means and sizes."""
    x = torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([2.0, 5.0])[:, None] + torch.tensor([1.0, -3.0])[:, None]


class Store:
    def batches(self, size):
        return acts().split(size)


def test_the_scale_of_two_tokens_by_hand():
    # model 0: (3, 4) and (-3, -4): mean 0, norms 5; model 1: (0, 1) and (0, -1): norms 1; target √2
    x = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[-3.0, -4.0], [0.0, -1.0]]])
    per_model = Normalizer.fit([x], scale="per_model")
    assert per_model.scale.tolist() == pytest.approx([math.sqrt(2) / 5, math.sqrt(2)])
    common = Normalizer.fit([x], scale="common")
    assert common.scale.tolist() == pytest.approx([math.sqrt(2) / 3] * 2)


@pytest.mark.parametrize("statistic", ["mean_norm", "median_norm", "rms"])
@pytest.mark.parametrize("center", [True, False])
def test_the_statistic_of_each_model_reaches_its_target(statistic, center):
    x = acts()
    normalizer = Normalizer.fit(
        x.split(64), scale="per_model", center=center, statistic=statistic, target=10.0
    )
    norms = normalizer.normalise(x).norm(dim=-1)
    measure = {
        "mean_norm": lambda n: n.mean(0),
        "median_norm": lambda n: n.median(0).values,
        "rms": lambda n: n.square().mean(0).sqrt(),
    }
    assert measure[statistic](norms).tolist() == pytest.approx([10, 10], rel=2e-3)
    assert (normalizer.mean.abs().max() > 0) == center


def test_the_default_centres_each_model_and_keeps_their_ratio():
    x = acts()
    y = Normalizer.fit([x]).normalise(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(2, 8), atol=1e-5, rtol=0)
    norms = y.norm(dim=-1).mean(0)
    assert norms.mean().item() == pytest.approx(math.sqrt(8), rel=1e-5)
    raw = (x - x.mean(0)).norm(dim=-1).mean(0)
    assert (norms[1] / norms[0]).item() == pytest.approx((raw[1] / raw[0]).item(), rel=1e-5)


def test_fit_does_not_depend_on_how_the_tokens_are_cut_or_offered():
    x = acts()
    whole = Normalizer.fit([x])
    for batches in (x.split(7), iter(x.split(7)), Store()):
        other = Normalizer.fit(batches)
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.scale, whole.scale, rtol=1e-6, atol=0)


def test_fit_reads_no_more_than_max_tokens_of_an_endless_stream():
    def endless():
        while True:
            yield acts(64)

    assert torch.equal(Normalizer.fit(endless(), max_tokens=64).mean, Normalizer.fit([acts(64)]).mean)


def test_normalise_and_denormalise_are_inverses():
    normalizer, x = Normalizer.fit([acts()], scale="per_model"), acts(seed=1)
    torch.testing.assert_close(normalizer.denormalise(normalizer.normalise(x)), x, rtol=1e-5, atol=1e-5)


def test_unscaled_rows_add_in_raw_units_what_they_add_in_normalised_units():
    normalizer, x, rows = Normalizer.fit([acts()], scale="per_model"), acts(), torch.randn(1, 2, 8)
    torch.testing.assert_close(
        normalizer.normalise(x + normalizer.unscale_rows(rows)),
        normalizer.normalise(x) + rows,
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_identity_changes_nothing():
    x = acts()
    assert torch.equal(Normalizer.identity(2, 8).normalise(x), x)
    assert Normalizer.fit([x], center=False, scale=None).state_dict().keys() == {"mean", "scale"}


def test_a_nan_is_refused_with_its_place():
    x = acts()
    x[130, 1, 3] = float("nan")
    with pytest.raises(NonFiniteActs, match="token 130 of model 1"):
        Normalizer.fit(x.split(64))


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(EmptyData):
        Normalizer.fit([])
    with pytest.raises(ValueError, match=r"mean_norm \[0.0, 0.0\]"):
        Normalizer.fit([torch.ones(5, 2, 3)])
    with pytest.raises(ValueError, match="scales above 0"):
        Normalizer(torch.zeros(2, 3), torch.tensor([1.0, 0.0]))
