"""Adam for a crosscoder: a block of latents at a time, so that a row's gradient is made, clipped and used while it is in cache."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.partition import projection
from tl_crosscoder.dictionary.row_grads import RowGrads, blocks, kept_apart
from tl_crosscoder.dictionary.shard import by_latent
from tl_crosscoder.training.kernels import Unwritten, kernels_for
from tl_crosscoder.training.moments import Moments

BETAS = (0.9, 0.999)
EPS = 1e-8
#: Some rows of a parameter's gradient: its name, which rows, and what they are.
Gradient = tuple[str, slice, Tensor | Unwritten]


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
        norm = self._norm(apart, held)
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
        held: list[Gradient] | None,
        apart: dict[str, RowGrads],
        factor: float,
    ) -> None:
        """Multiply the gradient: as it is held, or else what it is made of."""
        made_of = [p.grad for p in self.parameters.values() if p.grad is not None]
        for gradient in made_of if held is None else [g for _, _, g in held if isinstance(g, Tensor)]:
            gradient.mul_(factor)
        for grads in apart.values():
            grads.scale_(factor)

    def _norm(self, apart: dict[str, RowGrads], held: list[Gradient] | None) -> Tensor:
        """The norm of the gradient of all latents."""
        like = self.parameters["b_dec"]
        squares = like.new_zeros(2, dtype=torch.promote_types(like.dtype, torch.float32))
        for name, square in self._squares(apart) if held is None else map(_square, held):
            squares[int(by_latent(name))] += square
        common, here = squares
        return (common + self.shard.latents.add_(here)).sqrt()

    def _squares(self, apart: dict[str, RowGrads]) -> Iterator[tuple[str, Tensor]]:
        """Sums of squares of every parameter's gradient, on one rank's tokens."""
        for name, parameter in self.parameters.items():
            plain = name in apart and parameter.grad is None and projection(parameter) is None
            square = apart[name].square() if plain and self.kernels.gathered is None else None
            yield from map(_square, self._gradient(name, apart)) if square is None else [(name, square)]

    def _gradients(self, apart: dict[str, RowGrads]) -> Iterator[Gradient]:
        """The gradient of every parameter, on the whole batch: a block of its rows at a time, or as the kernels want it."""
        for name in self.parameters:
            yield from self._gradient(name, apart)

    def _gradient(self, name: str, apart: dict[str, RowGrads]) -> Iterator[Gradient]:
        parameter = self.parameters[name]
        if name not in apart:
            if parameter.grad is not None:
                yield name, slice(None), self.shard.mean(parameter.grad)
        elif self.kernels.gathered is not None and self.shard.tokens.size == 1:
            yield name, slice(None), self.kernels.gathered(apart[name], parameter)
        else:
            for rows in blocks(len(parameter), parameter[:1]):
                gradient = apart[name].block(rows.start, rows.stop, parameter).view_as(parameter[rows])
                if parameter.grad is not None:
                    gradient += parameter.grad[rows]
                if (project := projection(parameter)) is not None:
                    project(gradient, first=rows.start)
                yield name, rows, self.shard.mean(gradient)


def _square(part: Gradient) -> tuple[str, Tensor]:
    name, _, gradient = part
    whole = isinstance(gradient, Tensor)
    return name, gradient.flatten().dot(gradient.flatten()) if whole else gradient.square()


def _hooked(parameter: nn.Parameter) -> bool:
    """It has gradient hooks beside its partition's."""
    after = parameter._post_accumulate_grad_hooks or ()
    return bool(parameter._backward_hooks) or len(after) > (projection(parameter) is not None)
