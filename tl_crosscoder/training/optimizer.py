"""Adam for a crosscoder: a block of latents at a time, so that a row's gradient is made, clipped and used while it is in cache."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.partition import projection
from tl_crosscoder.dictionary.row_grads import RowGrads, kept_apart
from tl_crosscoder.dictionary.shard import by_latent
from tl_crosscoder.training.kernels import Unwritten, kernels_for
from tl_crosscoder.training.moments import Moments

BETAS = (0.9, 0.999)
EPS = 1e-8
#: Bytes of a block of rows on a CPU; elsewhere all rows are one block.
BLOCK_BYTES = 1 << 21


class Adam:
    """Adam (Kingma and Ba 2015) with betas .9 and .999, the norm of the whole gradient cut to ``clip``.

    The gradient of the large weights is never held: each row's is made twice, for the norm and for the step, which costs no more
    than writing it and reading it back, and saves memory of the weights' size.  Weights with gradient hooks of a user's are the
    exception: their gradients are written out, for the hooks to see.  ``halved``: bfloat16 moments of the large weights.
    ``kernels``: what takes the step; where ranks read different tokens, and so exchange gradients, torch does.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        *,
        halved: bool = False,
        kernels: Literal["torch", "triton"] = "torch",
    ):
        self.kernels = kernels_for(kernels, crosscoder.W_enc_rows, crosscoder.W_dec)
        self.parameters, self.shard = dict(crosscoder.named_parameters()), crosscoder.shard
        self.steps = torch.zeros((), device=crosscoder.W_dec.device)
        self.moments = Moments(self.parameters, halved=halved)
        self._rows = [name for name, p in self.parameters.items() if p.dim() == 3]

    def state_dict(self) -> dict[str, Tensor]:
        """The number of steps taken and both moments of every parameter."""
        moments = {"exp_avg": self.moments.exp_avg, "exp_avg_sq": self.moments.exp_avg_sq}
        named = {f"{kind}.{name}": t for kind, tensors in moments.items() for name, t in tensors.items()}
        return {"steps": self.steps, **named}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state_dict()``."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def descend(self, terms: dict[str, Tensor], *, lr: float, clip: float, step: int) -> None:
        """One step of size ``lr`` down the sum of the terms; nothing changes unless loss and gradient are finite."""
        total = torch.stack(list(terms.values())).sum()
        if not self.shard.mean(total).isfinite():
            values = ", ".join(f"{name}={value.item():g}" for name, value in terms.items())
            raise FloatingPointError(
                f"the loss of step {step} is not finite ({values}); the weights are as before it. Lower lr?"
            )
        for parameter in self.parameters.values():
            parameter.grad = None
        rows = {name: self.parameters[name] for name in self._rows if not _hooked(self.parameters[name])}
        with kept_apart(list(rows.values())) as apart:
            torch.autograd.backward(total)  # not total.backward(): nnsight, once imported, traces that
        self._step(dict(zip(rows, apart, strict=True)), lr, clip, step)

    @torch.no_grad()
    def _step(self, apart: dict[str, RowGrads], lr: float, clip: float, step: int) -> None:
        # what ranks exchanged is kept for the step, not made and exchanged again
        held = list(self._gradients(apart)) if self.shard.tokens.size > 1 else None
        norm = self._norm(held or self._gradients(apart))
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient of step {step} is not finite; the weights are as before it. Lower lr?"
            )
        self.steps += 1
        if (shrink := clip / (norm.item() + 1e-6)) < 1:
            self._scale_(held, apart, shrink)
        self.moments.start(int(self.steps))
        for name, rows, gradient in held or self._gradients(apart):
            weights = self.parameters[name][rows]
            with self.moments.of(name, rows, weights) as (first, second):
                if not isinstance(gradient, Tensor):
                    gradient.adam_(weights, first, second, steps=int(self.steps), lr=lr, betas=BETAS, eps=EPS)
                    continue
                torch.ops.aten._fused_adam_(
                    [weights],
                    [gradient],
                    [first],
                    [second],
                    [],
                    [self.steps],
                    lr=lr,
                    beta1=BETAS[0],
                    beta2=BETAS[1],
                    weight_decay=0.0,
                    eps=EPS,
                    amsgrad=False,
                    maximize=False,
                )

    def _scale_(
        self,
        held: list[tuple[str, slice, Tensor | Unwritten]] | None,
        apart: dict[str, RowGrads],
        factor: float,
    ) -> None:
        """Multiply the gradient: as it is held, or else what it is made of."""
        made_of = [p.grad for p in self.parameters.values() if p.grad is not None]
        for gradient in made_of if held is None else [g for _, _, g in held if isinstance(g, Tensor)]:
            gradient.mul_(factor)
        for grads in apart.values():
            grads.scale_(factor)

    def _norm(self, gradients: Iterable[tuple[str, slice, Tensor | Unwritten]]) -> Tensor:
        """The norm of the gradient of all latents."""
        like = self.parameters["b_dec"]
        squares = like.new_zeros(2, dtype=torch.promote_types(like.dtype, torch.float32))
        for name, _, gradient in gradients:
            whole = isinstance(gradient, Tensor)
            square = gradient.flatten().dot(gradient.flatten()) if whole else gradient.square()
            squares[int(by_latent(name))] += square
        common, here = squares
        return (common + self.shard.latents.add_(here)).sqrt()

    def _gradients(self, apart: dict[str, RowGrads]) -> Iterator[tuple[str, slice, Tensor | Unwritten]]:
        """The gradient of every parameter, on the whole batch: a block of its rows at a time, or as the kernels want it."""
        gathered = self.kernels.gathered if self.shard.tokens.size == 1 else None
        for name, parameter in self.parameters.items():
            if name not in apart:
                if parameter.grad is not None:
                    yield name, slice(None), self.shard.mean(parameter.grad)
                continue
            if gathered is not None:
                yield name, slice(None), gathered(apart[name], parameter)
                continue
            for rows in blocks(parameter):
                gradient = apart[name].block(rows.start, rows.stop, parameter).view_as(parameter[rows])
                if parameter.grad is not None:
                    gradient += parameter.grad[rows]
                if (project := projection(parameter)) is not None:
                    project(gradient, first=rows.start)
                yield name, rows, self.shard.mean(gradient)


def _hooked(parameter: nn.Parameter) -> bool:
    """It has gradient hooks beside its partition's."""
    after = parameter._post_accumulate_grad_hooks or ()
    return bool(parameter._backward_hooks) or len(after) > (projection(parameter) is not None)


def blocks(parameter: nn.Parameter) -> Iterator[slice]:
    """Neighbouring rows that fit a processor's cache; all rows on a GPU.

    A block is a multiple of 16 rows: the kernel rounds the last numbers of a block otherwise where they fill no register, and
    tied rows must stay equal.
    """
    row_bytes = parameter[0].numel() * parameter.element_size()
    size = max(16, BLOCK_BYTES // row_bytes // 16 * 16) if parameter.device.type == "cpu" else len(parameter)
    for start in range(0, len(parameter), size):
        yield slice(start, min(start + size, len(parameter)))
