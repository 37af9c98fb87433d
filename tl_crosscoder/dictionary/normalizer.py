"""Raw activations to the units a crosscoder trains in, and back."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_crosscoder.errors import EmptyData, NonFiniteActs

STATISTICS = ("mean_norm", "median_norm", "rms")


class Normalizer(nn.Module):
    """``(x - mean) * scale``: a mean vector and one scale per model, frozen and saved with the weights.

    Lindsey et al. 2024 scale each model to mean norm √d_in without centring (``center=False, scale="per_model"``); Minder et al.
    2025, arXiv:2504.02922, train on raw activations (``Normalizer.identity``).  Different scales for the two models change the
    ratio of decoder norms, so the default is one common scale; the mean shift between the models stays outside the dictionary.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Float[Tensor, "model d_in"], scale: Float[Tensor, "model"]):
        super().__init__()
        if not mean.is_meta and not (mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise ValueError(
                f"a normaliser wants a finite mean and scales above 0, got scales {scale.tolist()}"
            )
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    @classmethod
    def identity(cls, n_models: int, d_in: int) -> "Normalizer":
        """The normaliser that changes nothing."""
        return cls(torch.zeros(n_models, d_in), torch.ones(n_models))

    @classmethod
    def fit(
        cls,
        batches: Any,
        *,
        center: bool = True,
        scale: Literal["common", "per_model"] | None = "common",
        statistic: Literal["mean_norm", "median_norm", "rms"] = "mean_norm",
        target: Literal["sqrt_d"] | float = "sqrt_d",
        max_tokens: int | None = None,
    ) -> "Normalizer":
        """The normaliser that brings the statistic of ‖x - mean‖ to ``target`` (√d_in), for each model or on average over models.

        ``batches`` is an iterable of raw [batch, model, d_in] tensors or has ``.batches(size)``.  It is read twice, in float64
        sums; an iterator that can be read only once is held in memory, so give it ``max_tokens``.  ``rms`` is √mean‖x - mean‖².
        """
        if statistic not in STATISTICS:
            raise ValueError(f"no statistic named {statistic!r}; known: {', '.join(STATISTICS)}")
        if scale not in ("common", "per_model", None):
            raise ValueError(f"scale is 'common', 'per_model' or None, got {scale!r}")
        if hasattr(batches, "batches"):
            held: Iterable[Tensor] = _Batches(batches)
        else:
            held = list(_first(batches, max_tokens)) if iter(batches) is batches else batches
        total, n = torch.zeros(()), 0
        for x in _first(held, max_tokens):
            _check_finite(x, n)
            total = total + x.double().sum(0).cpu()
            n += len(x)
        if not n:
            raise EmptyData("Normalizer.fit wants at least one token; the batches are empty")
        mean = total / n if center else torch.zeros_like(total)
        if scale is None:
            return cls(mean.float(), torch.ones(len(mean)))
        norms = torch.cat([_norms(x, mean) for x in _first(held, max_tokens)])
        sizes = _size(norms, statistic)
        if not (sizes > 0).all():
            raise ValueError(
                f"the activations have {statistic} {sizes.tolist()} per model; a scale needs values above 0"
            )
        wanted = mean.shape[1] ** 0.5 if target == "sqrt_d" else float(target)
        sizes = sizes.mean().expand_as(sizes) if scale == "common" else sizes
        return cls(mean.float(), (wanted / sizes).float())

    def normalise(self, x: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "batch model d_in"]:
        """Raw units to normalised units."""
        return (x - self.mean) * self.scale[:, None]

    def denormalise(self, y: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "batch model d_in"]:
        """Normalised units to raw units."""
        return y / self.scale[:, None] + self.mean

    def unscale_rows(self, rows: Float[Tensor, "latent model d_in"]) -> Float[Tensor, "latent model d_in"]:
        """Directions in normalised units as directions in raw units (no mean: differences have none)."""
        return rows / self.scale[:, None]


class _Batches:
    """Anything with ``.batches(size)`` as an iterable."""

    def __init__(self, store: Any, size: int = 4096):
        self.store, self.size = store, size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.store.batches(self.size))


def _first(batches: Iterable[Tensor], max_tokens: int | None) -> Iterator[Tensor]:
    left = max_tokens
    for x in batches:
        if left is None:
            yield x
            continue
        yield x[:left]
        left -= len(x[:left])
        if not left:
            return


def _norms(
    x: Float[Tensor, "batch model d_in"], mean: Float[Tensor, "model d_in"]
) -> Float[Tensor, "batch model"]:
    return (x.double() - mean.to(x.device)).norm(dim=-1).cpu()


def _size(norms: Float[Tensor, "batch model"], statistic: str) -> Float[Tensor, "model"]:
    if statistic == "median_norm":
        return norms.quantile(0.5, dim=0) if len(norms) < 2**24 else norms.median(0).values
    return norms.mean(0) if statistic == "mean_norm" else norms.square().mean(0).sqrt()


def _check_finite(x: Float[Tensor, "batch model d_in"], seen: int) -> None:
    if not x.isfinite().all():
        row, model = (~x.isfinite().all(-1)).nonzero()[0].tolist()
        raise NonFiniteActs(
            f"NaN or Inf in token {seen + row} of model {model}; drop that token from both models"
        )
