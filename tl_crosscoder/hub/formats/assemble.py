"""A Crosscoder out of tensors that lie in a file in another order."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import Sparsity
from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.hub.formats.base import Given
from tl_crosscoder.hub.tensors import Weights, read
from tl_crosscoder.widths import alike

OURS = ("d_sae", "model", "d_in")


@dataclass(frozen=True)
class Layout:
    """The names of the tensors of a file, with the axes of the two large ones, such as ``"model d_in d_sae"``."""

    W_enc: str
    enc_axes: str
    W_dec: str
    dec_axes: str
    b_enc: str | None
    b_dec: str | None


@dataclass
class Parts:
    """What a crosscoder is made of, in our order of axes; changed in place while it is converted."""

    enc: Float[Tensor, "d_sae model d_in"]
    dec: Float[Tensor, "d_sae model d_in"]
    b_enc: Float[Tensor, "d_sae"]
    b_dec: Float[Tensor, "model d_in"]

    def subtract_b_dec(self) -> None:
        """The encoder that reads x, of one that reads ``x - b_dec``: exact in real numbers, summed in float64."""
        for latents in torch.arange(len(self.enc)).split(4096):
            shift = self.enc[latents].flatten(1).double() @ self.b_dec.flatten().double()
            self.b_enc[latents] = (self.b_enc[latents].double() - shift).to(self.b_enc.dtype)

    def fold(self, mean: Float[Tensor, "model d_in"], scale: Float[Tensor, "model d_in"]) -> None:
        """The same dictionary on raw activations, of one that reads and writes ``(x - mean) * scale``."""
        self.enc *= scale.to(self.enc.dtype)
        for latents in torch.arange(len(self.enc)).split(4096):
            shift = self.enc[latents].flatten(1).double() @ mean.flatten().double()
            self.b_enc[latents] = (self.b_enc[latents].double() - shift).to(self.b_enc.dtype)
        self.dec /= scale.to(self.dec.dtype)
        self.b_dec = (self.b_dec.double() / scale + mean).to(self.b_dec.dtype)

    def widths(self) -> list[int]:
        """Each model's, where a file does not tell: up to the last dimension with a weight that is not zero."""
        used = self.enc.any(0) | self.dec.any(0) | (self.b_dec != 0)
        return [int(dims.nonzero().amax()) + 1 if dims.any() else len(dims) for dims in used]

    def swap_models(self) -> None:
        """Another order of the models, base first."""
        self.enc, self.dec, self.b_dec = self.enc.flip(1), self.dec.flip(1), self.b_dec.flip(0)


def read_parts(weights: Weights, layout: Layout, dtype: torch.dtype | None = None) -> Parts:
    """The tensors of a file, each read straight to its place."""
    axes = layout.enc_axes.split()
    sizes = dict(zip(axes, weights.shape(layout.W_enc), strict=True))
    shape, dtype = [sizes[axis] for axis in OURS], dtype or weights.dtype(layout.W_enc)
    if not dtype.is_floating_point:
        raise CorruptFile(f"{layout.W_enc!r} wants a float dtype, got {dtype}")
    enc, dec = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    weights.read_into(layout.W_enc, enc.permute([OURS.index(axis) for axis in axes]))
    weights.read_into(layout.W_dec, dec.permute([OURS.index(axis) for axis in layout.dec_axes.split()]))
    b_enc = torch.zeros(shape[0], dtype=dtype) if layout.b_enc is None else read(weights, layout.b_enc, dtype)
    b_dec = (
        torch.zeros(shape[1:], dtype=dtype) if layout.b_dec is None else read(weights, layout.b_dec, dtype)
    )
    return Parts(enc, dec, b_enc, b_dec)


def build(
    parts: Parts,
    sparsity: Sparsity,
    *,
    code_norm: Literal["sum", "l2", "none", "decoupled"] = "sum",
    mean: Float[Tensor, "model d_in"] | None = None,
    scale: Float[Tensor, "model"] | None = None,
    widths: list[int] | None = None,
) -> Crosscoder:
    """The crosscoder of these weights, in ``eval()``; no weight is copied.  ``mean`` and ``scale`` are its normaliser's."""
    d_sae, n_models, d_in = parts.enc.shape
    dtype = parts.enc.dtype
    normalizer = Normalizer.identity(n_models, d_in)
    if scale is not None:
        normalizer = Normalizer(torch.zeros(n_models, d_in) if mean is None else mean, scale)
    sparsity.check(d_sae)
    held = {name: tensor.to(dtype) for name, tensor in sparsity.state_dict(prefix="sparsity.").items()}
    with torch.device("meta"):
        made = Crosscoder(d_in, d_sae, sparsity, n_models=n_models, code_norm=code_norm, widths=widths)
    if not alike(made):
        made.init = Init(same=False)  # that they started alike would be refused
    state = {
        "W_enc_rows": parts.enc, "W_dec": parts.dec, "b_enc": parts.b_enc, "b_dec": parts.b_dec,
        "normalizer.mean": normalizer.mean.to(dtype), "normalizer.scale": normalizer.scale.to(dtype), **held,
    }  # fmt: skip
    made.load_state_dict(state, assign=True)
    made.check_padding()
    return made.eval()


def fold_given(parts: Parts, given: Given) -> tuple[Tensor | None, Tensor | None]:
    """The normaliser (mean, scale) of what the caller gave; a scale for each number is folded into the weights instead."""
    n_models, d_in = parts.b_dec.shape
    mean = _as_table(given.mean if given.mean is not None else 0.0, n_models, d_in, "mean")
    scale = _as_table(given.scale, n_models, d_in, "scale")
    if not (scale > 0).all():
        raise ValueError("every scale is above 0")
    if bool((scale == scale[:, :1]).all()):
        return mean, scale[:, 0]
    parts.fold(mean, scale)
    return None, None


def _as_table(value: Any, n_models: int, d_in: int, name: str) -> Float[Tensor, "model d_in"]:
    given = torch.as_tensor(value, dtype=torch.float64)
    if given.dim() == 1 and len(given) == n_models:
        given = given[:, None]
    try:
        table = given.expand(n_models, d_in).clone()
    except RuntimeError:
        table = None
    if table is None or not table.isfinite().all():
        raise ValueError(
            f"{name} wants one finite number, one a model ({n_models}), or [model={n_models}, d_in={d_in}], got "
            f"{list(given.shape)}"
        )
    return table
