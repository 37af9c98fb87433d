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

    Two models that are no fine-tunes of each other have norms that say nothing about each other: take ``scale="per_model"``.
    Of models of unlike width d_in is the largest for all, not each model's own, so that all come to one norm, weigh alike in the
    loss, and a concept that is equally strong in both has a delta_norm of .5.
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

        ``batches`` is an iterable of raw [batch, model, d_in] tensors on any device, or has ``.batches(size)``; the buffers are on
        the CPU until ``.to()`` moves them.  It is read twice, in float64 sums; only ``median_norm`` keeps a number for each token.
        ``max_tokens``: this many of a store's tokens, drawn with a fixed seed; of anything else the first, and those of an
        iterator, which can be read only once, are held in memory.  ``rms`` is √mean‖x - mean‖².

        Raises ValueError for what may never end (an iterator, a SyntheticPair) without ``max_tokens``.
        """
        if statistic not in STATISTICS:
            raise ValueError(f"no statistic named {statistic!r}; known: {', '.join(STATISTICS)}")
        if scale not in ("common", "per_model", None):
            raise ValueError(f"scale is 'common', 'per_model' or None, got {scale!r}")
        held = _held(batches, max_tokens)
        total, n = torch.zeros((), device="cpu"), 0
        for x in _first(held, max_tokens):
            _check_finite(x, n)
            total = total + x.cpu().double().sum(0)
            n += len(x)
        if not n:
            raise EmptyData("Normalizer.fit wants at least one token; the batches are empty")
        mean = total / n if center else torch.zeros_like(total)
        if scale is None:
            return cls(mean.float(), mean.new_ones(len(mean)).float())
        sizes = _size((_norms(x, mean) for x in _first(held, max_tokens)), statistic)
        if not (sizes > 0).all():
            raise ValueError(
                f"the activations have {statistic} {sizes.tolist()} per model; a scale needs values above 0"
            )
        wanted = mean.shape[1] ** 0.5 if target == "sqrt_d" else float(target)
        sizes = sizes.mean().expand_as(sizes) if scale == "common" else sizes
        return cls(mean.float(), (wanted / sizes).float())

    def normalise(self, x: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "batch model d_in"]:
        """Raw units to normalised units."""
        return (x - self.mean).mul_(self.scale[:, None])

    def denormalise(self, y: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "batch model d_in"]:
        """Normalised units to raw units."""
        return y / self.scale[:, None] + self.mean

    def unscale_rows(self, rows: Float[Tensor, "latent model d_in"]) -> Float[Tensor, "latent model d_in"]:
        """Directions in normalised units as directions in raw units (no mean: differences have none)."""
        return rows / self.scale[:, None]


class _Store:
    """Anything with ``.batches(size)``; ``mixed``: the same random order at every reading."""

    def __init__(self, store: Any, *, mixed: bool, size: int = 4096):
        self.store, self.mixed, self.size = store, mixed, size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.store.shuffled(self.size, seed=0) if self.mixed else self.store.batches(self.size))


def _held(batches: Any, max_tokens: int | None) -> Iterable[Tensor]:
    """The batches as something that can be read twice and ends."""
    store = hasattr(batches, "batches")
    once = not store and iter(batches) is batches
    if max_tokens is None and (once or (store and not hasattr(batches, "__len__"))):
        raise ValueError(
            f"Normalizer.fit got a {type(batches).__name__}, which may never end; pass max_tokens=100_000 or a list of batches"
        )
    if store:
        return _Store(batches, mixed=max_tokens is not None and hasattr(batches, "shuffled"))
    return list(_first(batches, max_tokens)) if once else batches


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
    return (x.cpu().double() - mean).norm(dim=-1)


def _size(norms: Iterator[Tensor], statistic: str) -> Float[Tensor, "model"]:
    if statistic == "median_norm":
        every = torch.cat(list(norms))
        return every.quantile(0.5, dim=0) if len(every) < 2**24 else every.median(0).values
    power, total, n = 1 if statistic == "mean_norm" else 2, torch.zeros((), device="cpu"), 0
    for part in norms:
        total = total + part.pow(power).sum(0)
        n += len(part)
    return (total / n) ** (1 / power)


def _check_finite(x: Float[Tensor, "batch model d_in"], seen: int) -> None:
    if not x.isfinite().all():
        row, model = (~x.isfinite().all(-1)).nonzero()[0].tolist()
        raise NonFiniteActs(
            f"NaN or Inf in token {seen + row} of model {model}; drop that token from both models"
        )
