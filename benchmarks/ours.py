"""This library's training step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from typing import Literal

import torch
from contenders import SILENT, Contender, Start, Unsupported
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses import MSE, AuxK, Loss, Progress
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train


class Ours(Contender):
    """``tl_crosscoder.train`` itself, in a thread of its own: whenever it asks for a batch, the step before is done."""

    key, title = "ours", "this library"
    moments: Literal["as weights", "bfloat16"] = "as weights"
    kernels: Literal["torch", "triton"] = "torch"

    def __init__(self, start: Start, lr: float):
        d_sae, _, d_in = start.W_dec.shape
        self.crosscoder = crosscoder = Crosscoder(d_in, d_sae, BatchTopK(start.k, threshold_start=0.0))
        crosscoder.to(start.W_dec)
        with torch.no_grad():
            crosscoder.W_enc_rows.copy_(start.W_enc)
            crosscoder.b_enc.copy_(start.b_enc)
            crosscoder.W_dec.copy_(start.W_dec)
            crosscoder.b_dec.copy_(start.b_dec)
        self.loss = Watched(MSE())
        self.losses = [self.loss, KnownDead(AuxK(), start.dead * SILENT)]
        never = 1_000_000
        self.config = TrainConfig(
            never,
            lr,
            warmup_steps=0,
            decay_fraction=0.0,
            b_dec_init="zeros",
            log_every=never,
            progress=False,
            moments=self.moments,
            kernels=self.kernels,
        )
        self.given: SimpleQueue[Tensor | None] = SimpleQueue()
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()
        self.thread = Thread(target=self._train, daemon=True)
        self.thread.start()
        self._wait()

    def step(self, x: Tensor) -> Tensor:
        self.given.put(x)
        self._wait()
        return self.loss.value

    @torch.no_grad()
    def l0(self, x: Tensor) -> float:
        return self.crosscoder.encode(x).count_nonzero().item() / len(x)

    def close(self) -> None:
        self.given.put(None)
        self.thread.join()

    def _wait(self) -> None:
        if (error := self.done.get()) is not None:
            raise error

    def _batches(self) -> Iterator[Tensor]:
        while True:
            self.done.put(None)
            if (x := self.given.get()) is None:
                raise Closed
            yield x

    def _train(self) -> None:
        try:
            train(self.crosscoder, self._batches(), self.losses, self.config)
        except Closed:
            pass
        except BaseException as error:
            self.done.put(error)


class OursHalved(Ours):
    key, title, moments = "ours-halved", "this library, bf16 moments", "bfloat16"


class OursTriton(Ours):
    key, title, kernels = "ours-triton", "this library, Triton kernels", "triton"

    def __init__(self, start: Start, lr: float):
        try:
            super().__init__(start, lr)
        except ValueError as error:  # no GPU, no interpreter
            raise Unsupported(str(error)) from error


class Closed(Exception):
    """No more batches will be given."""


class Watched:
    """A loss that keeps its last value."""

    def __init__(self, loss: Loss):
        self.original, self.name, self.value = loss, loss.name, torch.tensor(torch.nan)

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Tensor:
        value = self.original(x, out, crosscoder, progress)
        self.value = value.detach()
        return value


@dataclass(frozen=True, eq=False)
class KnownDead:
    """An auxiliary loss that is told which latents are dead."""

    original: Loss
    tokens_since_fired: Tensor

    @property
    def name(self) -> str:
        return self.original.name

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Tensor:
        told = replace(progress, tokens_since_fired=self.tokens_since_fired)
        return self.original(x, out, crosscoder, told)
