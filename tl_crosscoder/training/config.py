"""How to train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser's settings, when to save and where to report.  Adam with betas .9 and .999; the data decide the batch size."""

    steps: int = 1000
    #: Adam's step size at its highest.
    lr: float = 1e-3
    #: Steps of linear rise from 0 to ``lr``.
    warmup_steps: int = 50
    #: Fraction of ``steps`` over which ``lr`` falls linearly to 0 at the end.
    decay_fraction: float = 0.2
    #: Largest norm of the whole gradient.
    clip: float = 1.0
    #: What Adam's moments of the encoder and the decoder are kept in: the weights' precision, or bfloat16 rounded by chance, which
    #: saves memory of the weights' size for a little time.
    moments: Literal["as weights", "bfloat16"] = "as weights"
    #: What sums the rows of active pairs and takes Adam's step on the encoder and the decoder: torch, or kernels for Triton, which
    #: want the weights on a GPU.  The same to rounding; see docs/performance.md.
    kernels: Literal["torch", "triton"] = "torch"
    #: Where an untrained (all zero) ``b_dec`` starts: each model's geometric median of the first batch, or zeros.
    b_dec_init: Literal["geometric_median", "zeros"] = "geometric_median"
    #: Steps between two rows of the log.
    log_every: int = 50
    #: Steps between two checkpoints, where there is a folder for them; the last step leaves one too.
    checkpoint_every: int = 500
    #: How many of the newest checkpoints stay; the best one stays beside them.
    keep_last: int = 2
    #: A JSON-lines file, one row a line; its folder is made (None: no file).
    log_path: str | Path | None = None
    #: A bar on a terminal, lines elsewhere; False: silent.
    progress: bool = True
    #: Name of a Weights & Biases project (None: none).
    wandb_project: str | None = None

    def __post_init__(self):
        for name in ("steps", "log_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} starts at 1, got {name}={getattr(self, name)}")
        if not (self.lr > 0 and self.clip > 0 and self.warmup_steps >= 0 and 0 <= self.decay_fraction <= 1):
            raise ValueError(
                f"want lr > 0, clip > 0, warmup_steps >= 0 and decay_fraction in [0, 1], got lr={self.lr}, clip={self.clip}, "
                f"warmup_steps={self.warmup_steps}, decay_fraction={self.decay_fraction}"
            )
        if self.b_dec_init not in ("geometric_median", "zeros"):
            raise ValueError(f"b_dec_init is 'geometric_median' or 'zeros', got {self.b_dec_init!r}")

        if self.moments not in ("as weights", "bfloat16"):
            raise ValueError(f"moments is 'as weights' or 'bfloat16', got {self.moments!r}")
        if self.kernels not in ("torch", "triton"):
            raise ValueError(f"kernels is 'torch' or 'triton', got {self.kernels!r}")

    def lr_at(self, step: int) -> float:
        """The step size at ``step`` (from 0): linear rise, level, linear fall."""
        rise = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        fall = (self.steps - step) / (self.decay_fraction * self.steps) if self.decay_fraction else 1.0
        return self.lr * min(1.0, rise, fall)
