"""A crosscoder as the SAE that it is on the concatenated activations: index m · d_in + i is dimension i of model m."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import TopK
from tl_crosscoder.hub.sae_lens.thresholds import AT_ONCE, code_norms, refuse_inexpressible, thresholds


@dataclass(frozen=True, eq=False)
class Flat:
    """``f = p · [p > threshold]`` with ``p = x @ W_enc + b_enc`` and ``recon = f @ W_dec + b_dec``, x raw and flat.

    With ``k`` in place of thresholds, f are the k largest p, those above 0.
    """

    W_enc: Float[Tensor, "_ d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae _"]
    b_dec: Float[Tensor, "_"]
    threshold: Float[Tensor, "d_sae"] | None = None
    k: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Under the names that SAE-Lens gives them."""
        found = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def encode(self, x: Float[Tensor, "batch _"]) -> Float[Tensor, "batch d_sae"]:
        """As SAE-Lens does it: densely."""
        pre_acts = x @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return pre_acts.relu() * (pre_acts > self.threshold)
        values, latents = pre_acts.topk(self.k or 0, dim=-1)
        return torch.zeros_like(pre_acts).scatter_(-1, latents, values.relu())

    def decode(self, acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch _"]:
        return acts @ self.W_dec + self.b_dec

    def float(self) -> "Flat":
        """In float32."""
        return Flat(**{name: tensor.float() for name, tensor in self.tensors().items()}, k=self.k)


@torch.no_grad()
def flatten(crosscoder: Crosscoder) -> Flat:
    """The same function of raw flat activations: the code norm, the normaliser and the mean over models are folded in.

    Codes stay those of ``encode``: the code norm goes into the thresholds.  A TopK has none, so that it goes into the weights,
    and the codes come out weighed, f · norm.  Raises ValueError, with the reason, for what cannot be written so.
    """
    refuse_inexpressible(crosscoder)
    mean, scale = crosscoder.normalizer.mean, crosscoder.normalizer.scale
    divisor = crosscoder.n_models if crosscoder.encoder == "mean" else 1
    encoder = crosscoder.W_enc_rows * (scale[:, None] / divisor)
    b_enc = crosscoder.b_enc.clone()
    if mean.any():
        for first, stop in pairwise([*range(0, crosscoder.d_sae, AT_ONCE), crosscoder.d_sae]):
            rows = slice(first, stop)
            shift = encoder[rows].double().flatten(1) @ mean.double().flatten()
            b_enc[rows] = (crosscoder.b_enc[rows].double() - shift).to(b_enc.dtype)
    decoder = crosscoder.W_dec / scale[:, None]
    b_dec = crosscoder.normalizer.denormalise(crosscoder.b_dec[None])[0].flatten()
    # the norms of the decoder as it is now: who reads the file back finds the same thresholds
    units = crosscoder.units or crosscoder.normalizer
    norms = code_norms(decoder, units.scale, crosscoder.code_norm)
    if not isinstance(crosscoder.sparsity, TopK):
        W_enc = encoder.flatten(1).T.contiguous()
        threshold = thresholds(crosscoder.sparsity, norms, b_enc.dtype)
        return Flat(W_enc, b_enc, decoder.flatten(1), b_dec, threshold)
    weights = norms.to(b_enc)
    decoder /= weights.where(weights > 0, 1)[:, None, None]
    W_enc = (encoder * weights[:, None, None]).flatten(1).T.contiguous()
    return Flat(W_enc, b_enc * weights, decoder.flatten(1), b_dec, k=crosscoder.sparsity.k)
