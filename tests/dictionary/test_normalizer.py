import gc
import math

import pytest
import torch
from synthetic_runs import small_pair

from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.errors import EmptyData, NonFiniteActs


def acts(n=500, seed=0):
    """Two models with different means and sizes."""
    x = torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([2.0, 5.0])[:, None] + torch.tensor([1.0, -3.0])[:, None]


class Store:
    """Tokens sorted by size, as a store's are by the length of their text."""

    def __init__(self, x=None):
        x = acts() if x is None else x
        self.x = x[x.norm(dim=(1, 2)).argsort()]

    def __len__(self):
        return len(self.x)

    def batches(self, size):
        return self.x.split(size)

    def shuffled(self, batch_size, seed):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        return self.x[order].split(batch_size)


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
    for batches in (x.split(7), Store()):
        other = Normalizer.fit(batches)
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.scale, whole.scale, rtol=1e-6, atol=0)


def test_fit_reads_no_more_than_max_tokens_of_an_endless_stream():
    def endless():
        while True:
            yield acts(64)

    assert torch.equal(Normalizer.fit(endless(), max_tokens=64).mean, Normalizer.fit([acts(64)]).mean)


def test_an_iterator_is_held_for_its_two_readings():
    x = acts()
    whole, other = Normalizer.fit([x]), Normalizer.fit(iter(x.split(7)), max_tokens=len(x))
    torch.testing.assert_close(other.state_dict(), whole.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [small_pair, lambda: small_pair().batches(64)])
def test_what_may_never_end_is_refused_without_max_tokens(make):
    with pytest.raises(ValueError, match=r"may never end; pass max_tokens=100_000"):
        Normalizer.fit(make())
    assert Normalizer.fit(make(), max_tokens=100).mean.shape == (2, 32)


def test_the_first_tokens_of_a_sorted_store_are_not_its_sample():
    """500 of 20,000 tokens: the smallest ones would give half the norm."""
    x, options = acts(20_000), {"center": False, "scale": "per_model"}
    whole = Normalizer.fit([x], **options)
    sample = [Normalizer.fit(Store(x), max_tokens=500, **options) for _ in range(2)]
    torch.testing.assert_close(sample[0].scale, whole.scale, rtol=0.05, atol=0)
    assert torch.equal(sample[0].scale, sample[1].scale)


@pytest.mark.parametrize("statistic", ["mean_norm", "rms"])
def test_memory_does_not_grow_with_the_tokens(statistic):
    """The tensors alive after 2 and after 50 batches of the second reading hold the same numbers."""
    x, alive = acts(4096), []

    class Long:
        def __iter__(self):
            for number in range(50):
                yield x
                if number in (1, 49):
                    alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))

    Normalizer.fit(Long(), statistic=statistic)
    assert abs(alive[3] - alive[2]) < 4096


def test_the_default_device_does_not_matter():
    """Buffers are on the CPU; .to() moves them."""
    x = acts()
    with torch.device("meta"):
        fitted = [Normalizer.fit([x], scale=scale) for scale in ("common", None)]
    for normalizer, scale in zip(fitted, ("common", None), strict=True):
        assert normalizer.mean.device.type == normalizer.scale.device.type == "cpu"
        assert torch.equal(normalizer.scale, Normalizer.fit([x], scale=scale).scale)
    assert fitted[0].to("meta").mean.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_give_the_same_buffers_on_the_cpu():
    x = acts()
    here, there = Normalizer.fit([x]), Normalizer.fit([x.cuda()])
    assert all(torch.equal(value, there.state_dict()[name]) for name, value in here.state_dict().items())


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
