"""The pre-activation above which each latent is active, in evaluation."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.prefix import first_latents
from tl_crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, ReLU, Sparsity, Split, Threshold, TopK

#: Latents looked at together: their float64 copies are small beside the weights.
AT_ONCE = 4096


def refuse_inexpressible(crosscoder: Crosscoder) -> None:
    """Raise ValueError, with the reason, for a crosscoder that is no SAE with a threshold for each latent or one k."""
    if reason := inexpressible(crosscoder):
        raise ValueError(reason)


def inexpressible(crosscoder: Crosscoder) -> str | None:
    """Why SAE-Lens cannot hold this crosscoder; None where it can."""
    if crosscoder.shard.latents.size > 1:
        return "these are some latents of a crosscoder trained in several processes; load the whole one"
    return _reason(crosscoder.sparsity, "")


def _reason(sparsity: Any, where: str) -> str | None:
    kind = type(sparsity)
    if kind is Split:
        return _reason(sparsity.first, "inside Split ") or _reason(sparsity.rest, "inside Split ")
    if kind is TopK and where:
        return "SAE-Lens' topk takes one k for all latents, and a TopK inside Split is for some of them"
    if kind is BatchTopK and sparsity.threshold < 0:
        return f"BatchTopK {where}has no threshold yet, which SAE-Lens encodes by; train it or set sparsity.threshold"
    if kind not in (ReLU, JumpReLU, BatchTopK, Threshold, TopK):
        return (
            f"SAE-Lens knows a threshold for each latent (jumprelu) or the k largest of all (topk); {kind.__name__} "
            f"{where}is neither.  Keep it in this library's format"
        )
    return None


def code_norms(
    decoder: Float[Tensor, "d_sae model d_in"], units: Float[Tensor, "model"], code_norm: str
) -> Float[Tensor, "d_sae"]:
    """``selection_norms`` in float64, of a raw decoder whose normalised units are ``units`` times larger."""
    if code_norm == "none":
        return decoder.new_ones(len(decoder), dtype=torch.float64)
    norms = torch.cat([rows.double().norm(dim=-1) for rows in decoder.split(AT_ONCE)]) * units.double()
    return norms.sum(-1) if code_norm == "sum" else norms.norm(dim=-1)


def thresholds(
    sparsity: Sparsity, norms: Float[Tensor, "d_sae"], dtype: torch.dtype
) -> Float[Tensor, "d_sae"]:
    """As large as the dtype allows for a latent of norm 0, which is never active: infinity is no number for a file."""
    never = torch.finfo(dtype).max
    return _of(sparsity, norms).where(norms > 0, never).clamp(max=never).to(dtype)


def _of(sparsity: Sparsity, norms: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
    if isinstance(sparsity, BatchTopK):
        return sparsity.threshold.double() / norms
    if isinstance(sparsity, Threshold) and sparsity.threshold is not None:
        return sparsity.threshold.double().clamp(min=0)
    if isinstance(sparsity, JumpReLU):
        found = sparsity.thresholds.detach()
        return found.double().where(found > 2 * torch.finfo(found.dtype).tiny, 0)  # exp() reaches no 0
    if isinstance(sparsity, Split):
        n = first_latents(sparsity.n_first, len(norms))
        return torch.cat([_of(sparsity.first, norms[:n]), _of(sparsity.rest, norms[n:])])
    return torch.zeros_like(norms)


def jumprelu(threshold: Float[Tensor, "d_sae"], like: Sparsity | None = None) -> JumpReLU:
    """A JumpReLU with these thresholds, and with the settings of another; 0 becomes the smallest that has a logarithm."""
    made = JumpReLU(like.init_threshold, like.bandwidth) if isinstance(like, JumpReLU) else JumpReLU()
    made.log_threshold = nn.Parameter(_logarithm(threshold))
    return made


def _logarithm(threshold: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
    """The logarithm whose ``exp()`` is the number itself, if it is near the rounded one; otherwise that one."""
    threshold = threshold.clamp(min=torch.finfo(threshold.dtype).tiny)
    if threshold.dtype not in (torch.float32, torch.float64):
        return threshold.log()
    best = nearest = threshold.log()
    for towards in (torch.inf, -torch.inf):
        tried = nearest
        for _ in range(4):
            tried = tried.nextafter(torch.full_like(tried, towards))
            best = tried.where(tried.exp() == threshold, best)
    return best
