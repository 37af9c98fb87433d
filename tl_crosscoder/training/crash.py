"""A step whose loss or gradient was not finite, taken again."""

from pathlib import Path

import torch

from tl_crosscoder.dictionary.losses import LOSSES
from tl_crosscoder.training.checkpoint import newest
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.data import Feed
from tl_crosscoder.training.dead import FiringRecord
from tl_crosscoder.training.optimizer import Adam
from tl_crosscoder.training.state import TrainingState
from tl_crosscoder.training.train import take_step, training


def reproduce(directory: str | Path, device: torch.device | str = "cpu") -> dict[str, float]:
    """Each loss of the step that a folder ``crashed`` holds; FloatingPointError where it is again not finite.

    The folder has a checkpoint of the training just before that step, and the step's batch: neither the data nor the code that
    began the training are needed, only the classes of its losses.  To look closer::

        crash, _ = tl_crosscoder.training.checkpoint.newest(Path("checkpoints/crashed"))
        crash.crosscoder()(crash.state["batch"])      # "cursor": where in the data the batch was
    """
    crash, _ = newest(Path(directory))
    crosscoder, batch = crash.crosscoder().to(device), crash.state["batch"].to(device)
    losses = [LOSSES.build(described) for described in crash.training["losses"]]
    config = TrainConfig(**crash.training["config"], progress=False)
    firing = FiringRecord(crosscoder.d_sae, batch.device)
    optimizer = Adam(crosscoder, halved=config.moments == "bfloat16", kernels=config.kernels)
    state = TrainingState(crosscoder, optimizer, Feed([batch], config.steps), firing)
    state.load(crash)
    with training(crosscoder):
        _, terms = take_step(state, losses, config, batch, crash.step)
    return {name: term.item() for name, term in terms.items()}
