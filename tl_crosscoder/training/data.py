"""Batches without end, checked, and found again where a training stopped."""

import hashlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import BatchTopK, Sparsity
from tl_crosscoder.errors import EmptyData, NonFiniteActs
from tl_crosscoder.widths import refuse_unlike


@runtime_checkable
class Resumable(Protocol):
    """Batches that know where they are: the state, tensors and JSON values, is that after the last batch they gave."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Feed:
    """``steps`` finite batches; the iterable is read again from the start whenever it ends.

    ``load_state_dict`` goes back to where ``state_dict`` was taken.  Batches that are ``Resumable`` do so themselves.  Others are
    counted: those of the epoch that were seen are read again and passed over, from torch's random state at the epoch's start, and
    the last of them must have the bytes that it had.

    Raises EmptyData where the batches end early: they are empty, or an iterator that can be read only once.
    """

    def __init__(self, batches: Iterable[Tensor], steps: int):
        self.batches, self.steps = batches, steps
        self.step = self.epoch = self.batch = 0
        self.random_state = torch.get_rng_state()
        self.last: Tensor | None = None
        self._rest: Iterator[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        rest, self._rest = self._rest, None
        while self.step < self.steps:
            fresh, before = rest is None, self.step
            for x in self._epoch() if rest is None else rest:
                check_finite(x, self.step)
                self.step, self.batch, self.last = self.step + 1, self.batch + 1, x
                yield x
                if self.step == self.steps:
                    return
            if self.one_shot or (fresh and self.step == before):
                raise EmptyData(
                    f"the batches ended after {self.step} of {self.steps} steps and cannot be read again; "
                    f"pass an iterable that starts over (a list, store.shuffled(batch_size, seed)) or steps={self.step}"
                )
            rest, self.epoch, self.batch = None, self.epoch + 1, 0

    @property
    def one_shot(self) -> bool:
        """The batches can be read only once."""
        return isinstance(self.batches, Iterator)

    def notes(self) -> list[str]:
        """How often the data are read, where that is more than once and they tell their length."""
        length = operator.length_hint(self.batches)
        if self.one_shot or not 0 < length < self.steps:
            return []
        return [f"{self.steps} steps are {self.steps / length:.1f} epochs of {length} batches"]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands after the last batch given: tensors and JSON values."""
        if isinstance(self.batches, Resumable):
            return {"step": self.step, "batches": self.batches.state_dict()}
        counted = {"epoch": self.epoch, "batch": self.batch, "last_sha256": _sha256(self.last)}
        return {"step": self.step, "random_state": self.random_state, **counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back there; ValueError where the batches are not those of then."""
        if isinstance(self.batches, Resumable) != ("batches" in state):
            raise ValueError(
                f"a {type(self.batches).__name__} cannot go on from a checkpoint of another kind of batches; pass the same data"
            )
        self.step = state["step"]
        if isinstance(self.batches, Resumable):
            self.batches.load_state_dict(state["batches"])
            self._rest = iter(self.batches)
            return
        torch.set_rng_state(state["random_state"])
        self._rest = self._epoch()
        self.epoch, self.batch = state["epoch"], state["batch"]
        for _ in range(self.batch):
            self.last = next(self._rest, None)
        if _sha256(self.last) != state["last_sha256"]:
            raise ValueError(
                f"these are not the batches that the training read: batch {self.batch} of epoch {self.epoch + 1} differs; "
                "pass the same data in the same order"
            )

    def _epoch(self) -> Iterator[Tensor]:
        self.random_state = torch.get_rng_state()
        return iter(self.batches)


def _sha256(x: Tensor | None) -> str | None:
    if x is None:
        return None
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def refuse_store(batches: Iterable[Tensor], crosscoder: Crosscoder | None = None) -> None:
    """Raise TypeError for captured activations themselves: their sequences lie sorted by length.

    ShapeMismatch for models of unlike width that the crosscoder was not told of.
    """
    if hasattr(batches, "shuffled"):
        raise TypeError(
            f"a {type(batches).__name__} gives its tokens in their order, sorted by the length of the text; "
            "pass store.shuffled(batch_size, seed)"
        )
    if crosscoder is None or crosscoder.widths != getattr(batches, "widths", ()):
        refuse_unlike(
            batches, "a crosscoder without their widths", "pass Crosscoder(..., widths=store.widths)"
        )


def refuse_fractions(batches: Iterable[Tensor], sparsity: Sparsity) -> None:
    """Raise ValueError where BatchTopK's k · batch will not be a whole number, of batches that tell their size."""
    size = getattr(batches, "batch_size", None)
    for k in (part.k for part in sparsity.modules() if isinstance(part, BatchTopK)):
        if not isinstance(size, int) or float(k).is_integer():
            continue
        if not float(k * size).is_integer():
            raise ValueError(
                f"k={k} latents a token are {k * size} in a batch of {size} tokens, not a whole number; choose another k or batch "
                "size"
            )
        if not getattr(batches, "drop_last", True):
            raise ValueError(
                f"k={k} latents a token may be no whole number in a smaller last batch; leave it out (drop_last=True)"
            )


def check_finite(x: Float[Tensor, "batch model d_in"], step: int) -> None:
    """Raise NonFiniteActs where a value is NaN or Inf, EmptyData where there is none."""
    if not len(x):
        raise EmptyData(f"the batch of step {step} holds no token; leave empty batches out")
    if x.sum().isfinite() or x.isfinite().all():
        return
    row, model = (~x.isfinite().all(-1)).nonzero()[0].tolist()
    raise NonFiniteActs(
        f"NaN or Inf in the batch of step {step}: row {row}, model {model}; drop that token from both models"
    )


@torch.no_grad()
def geometric_median(
    y: Float[Tensor, "batch model d_in"], iterations: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, "model d_in"]:
    """For each model the point with the smallest summed distance to its rows (Weiszfeld's iteration)."""
    guess = y.mean(0)
    for _ in range(iterations):
        weights = 1 / ((y - guess).norm(dim=-1, keepdim=True) + 1e-8)
        new = (weights * y).sum(0) / weights.sum(0)
        moved, guess = (new - guess).norm(), new
        if moved <= tolerance * guess.norm():
            break
    return guess
