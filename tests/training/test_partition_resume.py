"""Ties and masks are the same bits in a training that was stopped and gone on with."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from synthetic_runs import small_pair

from tl_crosscoder.training.recipes import recipe
from tl_crosscoder.training.train import train

PAIR, STEPS, BATCH = small_pair(), 12, 32


class StoppedAfter:
    """Batches that fail after so many steps, as a machine would."""

    def __init__(self, steps):
        self.steps = steps

    def __iter__(self):
        yield from islice(PAIR.batches(BATCH), self.steps)
        if self.steps < STEPS:
            raise ConnectionError("the machine is gone")


@pytest.mark.parametrize("name", ["dsf", "dfc"])
def test_a_stopped_training_goes_on_in_its_partition(tmp_path, name):
    k = 4 if name == "dfc" else None
    chosen = recipe(name, PAIR.d_in, d_sae=60, tokens=STEPS * BATCH, batch_size=BATCH, k=k)
    config = replace(chosen.config, lr=1e-2, progress=False, checkpoint_every=5)
    normalizer = chosen.normalizer(PAIR.batches(BATCH))
    whole, stopped, resumed = (chosen.crosscoder(normalizer) for _ in range(3))
    train(whole, StoppedAfter(STEPS), chosen.losses, config)
    with pytest.raises(ConnectionError):
        train(stopped, StoppedAfter(8), chosen.losses, config, checkpoints=tmp_path / "c")
    train(resumed, StoppedAfter(STEPS), chosen.losses, config, resume=tmp_path / "c")
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor)
    parts, rows = resumed.partition.parts(60), resumed.W_dec.detach()
    assert torch.equal(rows[parts.shared, 0], rows[parts.shared, 1])
    assert not rows[parts.base, 1].any()
    assert not rows[parts.tuned, 0].any()
