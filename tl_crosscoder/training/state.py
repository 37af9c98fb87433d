"""All that the steps of a training to come depend on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.training.checkpoint import Checkpoint
from tl_crosscoder.training.data import Feed
from tl_crosscoder.training.dead import FiringRecord
from tl_crosscoder.training.history import History
from tl_crosscoder.training.optimizer import Adam
from tl_crosscoder.training.window import Window


@dataclass
class TrainingState:
    """All that the steps to come depend on, and what the log says of those gone by."""

    crosscoder: Crosscoder
    optimizer: Adam
    feed: Feed
    firing: FiringRecord
    history: History = field(default_factory=History)
    window: Window = field(default_factory=Window)
    tokens: int = 0

    def tree(self) -> dict[str, Any]:
        """Tensors and JSON values."""
        return {
            "crosscoder": dict(self.crosscoder.state_dict()),
            "attributes": {name: _attributes(module) for name, module in self.crosscoder.named_modules()},
            "optimizer": self.optimizer.state_dict(),
            "tokens": self.tokens,
            "tokens_since_fired": self.firing.tokens_since_fired,
            "window": self.window.state_dict(),
            "data": self.feed.state_dict(),
            "random": random_state(self.crosscoder.W_dec.device),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from there.  The data come first: where they are others, no weight changes."""
        tree, device = checkpoint.state, self.crosscoder.W_dec.device
        self.feed.load_state_dict(tree["data"])
        self.crosscoder.load_state_dict(tree["crosscoder"])
        for name, module in self.crosscoder.named_modules():
            for attribute, value in tree["attributes"][name].items():
                setattr(module, attribute, value)
        self.optimizer.load_state_dict(tree["optimizer"])
        self.firing.tokens_since_fired.copy_(tree["tokens_since_fired"])
        self.window.load_state_dict(tree["window"], device)
        self.tokens = tree["tokens"]
        self.history.rows = list(checkpoint.rows)
        torch.set_rng_state(tree["random"]["cpu"])
        if device.type == "cuda" and "cuda" in tree["random"]:
            torch.cuda.set_rng_state(tree["random"]["cuda"], device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's random numbers stand."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | cuda


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The plain values that a module keeps beside its tensors, such as where BatchTopK looks first."""
    common = vars(nn.Module())
    plain = (bool, int, float, str, type(None))
    return {
        name: value for name, value in vars(module).items() if name not in common and isinstance(value, plain)
    }
