import pytest
import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.moments import Moments, round_
from tl_crosscoder.training.train import train

D_IN, D_SAE = 6, 64
HALVED = TrainConfig(60, lr=1e-2, moments="bfloat16", progress=False)


def batches(n=60):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(8, D_IN, generator=generator)
    return [
        torch.stack([torch.randn(32, 8, generator=generator).relu() @ common] * 2, 1)
        + 0.1 * torch.randn(32, 2, D_IN, generator=generator)
        for _ in range(n)
    ]


def crosscoder(partition=Partition()):  # noqa: B008 - frozen
    return Crosscoder(D_IN, D_SAE, BatchTopK(4), partition=partition, init=Init(norm=0.5, same=False))


def test_rounding_gives_what_bfloat16_holds_and_is_right_on_average():
    x = torch.tensor([1.0, -1.0, 1 + 2.0**-9, -3.3e-5, 0.0])
    draws = torch.stack([round_(x.clone(), torch.tensor(n, dtype=torch.int32)) for n in range(1 << 16)])
    assert torch.equal(draws, draws.bfloat16().float())
    torch.testing.assert_close(draws.double().mean(0), x.double(), rtol=1e-7, atol=0.0)
    assert set(draws[:, 2].tolist()) == {1.0, 1 + 2.0**-7}


def test_a_second_moment_follows_a_step_that_nearest_rounding_would_lose():
    """Adam's recursion v ← .999 v + .001 g², from 1 to g² = 4: within 3 % of its closed form on average over the numbers."""
    like = torch.zeros(64, 2, 48)
    moments = Moments({"W": like}, halved=True)
    moments.exp_avg_sq["W"].fill_(1.0)
    nearest = torch.ones((), dtype=torch.bfloat16)
    for step in range(500):
        moments.start(step)
        with moments.of("W", slice(None), like) as (_, second):
            second.mul_(0.999).add_(0.001 * 4)
        nearest = (nearest.float() * 0.999 + 0.001 * 4).bfloat16()
    expected = 4 - 3 * 0.999**500
    assert nearest == 1.0  # bfloat16 alone does not move
    assert moments.exp_avg_sq["W"].float().mean().item() == pytest.approx(expected, rel=0.03)


def test_half_the_moments_train_about_as_well():
    losses = {}
    for moments in ("as weights", "bfloat16"):
        config = TrainConfig(60, lr=1e-2, moments=moments, log_every=60, progress=False)
        losses[moments] = train(crosscoder(), batches(), [MSE()], config).rows[-1]["loss"]
    assert losses["bfloat16"] == pytest.approx(losses["as weights"], rel=0.02)
    assert losses["bfloat16"] != losses["as weights"]


def test_tied_rows_stay_tied():
    tied = crosscoder(Partition(shared=0.5))
    train(tied, batches(), [MSE()], HALVED)
    assert torch.equal(tied.W_dec[:32, 0], tied.W_dec[:32, 1])
    assert not torch.equal(tied.W_dec[32:, 0], tied.W_dec[32:, 1])


def test_a_training_that_goes_on_has_the_bytes_of_one_that_never_stopped(tmp_path):
    whole, cut = crosscoder(), crosscoder()
    train(whole, batches(), [MSE()], HALVED)

    def interrupted():
        yield from batches()[:25]
        raise KeyboardInterrupt

    class Once:
        calls = 0

        def __iter__(self):
            self.calls += 1
            return interrupted() if self.calls == 1 else iter(batches())

    source = Once()
    saving = TrainConfig(60, lr=1e-2, moments="bfloat16", checkpoint_every=10, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(cut, source, [MSE()], saving, checkpoints=tmp_path)
    train(again := crosscoder(), source, [MSE()], saving, resume=tmp_path)
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name]), name
