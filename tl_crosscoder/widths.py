"""Models of unlike width in one tensor [..., model, d_in]: each keeps its first numbers, and the rest of its row is zero.

Zeros that are read and written by weights of zero change nothing: not a pre-activation, norm, loss or share of variance, and no
gradient reaches those weights.  What has a meaning in one width only, such as tuned − base, is refused where it is made.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tl_crosscoder.errors import ShapeMismatch


def alike(of: Any) -> bool:
    """Whether the models of a crosscoder, a pair or a store have one width; anything without ``widths`` has."""
    return len(set(getattr(of, "widths", ()))) <= 1


def refuse_unlike(of: Any, what: str, remedy: str = "") -> None:
    """Raise ShapeMismatch, naming ``what`` was asked for, where the models' widths differ."""
    if not alike(of):
        raise ShapeMismatch(
            f"{what} wants models of one width; these have widths {list(of.widths)}, and no direction of one is a direction of "
            f"the other{remedy and f'; {remedy}'}"
        )


def padded(x: Tensor, d_in: int) -> Tensor:
    """With zeros after the last numbers, up to ``d_in`` of them."""
    return x if x.shape[-1] == d_in else F.pad(x, (0, d_in - x.shape[-1]))


def cut(rows: Tensor, widths: tuple[int, ...], norm: float) -> Tensor:
    """The rows [latent, model, d_in], in place made zero beyond each model's width, and of this norm again."""
    for model, width in enumerate(widths):
        if width < rows.shape[-1]:
            rows[:, model, width:] = 0
            rows[:, model] *= norm / rows[:, model].norm(dim=-1, keepdim=True)
    return rows


def refuse_filled(x: Tensor, widths: tuple[int, ...], what: str) -> None:
    """Raise ShapeMismatch where [..., model, d_in] is not zero beyond a model's width."""
    for model, width in enumerate(widths):
        if width < x.shape[-1] and x[..., model, width:].any():
            raise ShapeMismatch(
                f"{what} of model {model} should be zero from number {width} on, its width; are the models swapped, or is "
                f"widths={list(widths)} not theirs?"
            )
