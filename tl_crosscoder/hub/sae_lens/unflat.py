"""The crosscoder that a flat SAE is."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import JumpReLU, ReLU, Sparsity, Threshold, TopK
from tl_crosscoder.hub.sae_lens.flat import Flat
from tl_crosscoder.hub.sae_lens.thresholds import code_norms, jumprelu, thresholds


@dataclass(frozen=True)
class Origin:
    """What the weights do not tell: how the crosscoder came about that was folded into them.

    ``units`` is the normaliser that was folded in, in whose units decoder norms and classes are told; ``sparsity`` is how the
    thresholds came about, and is used where it still gives them.
    """

    n_models: int
    sparsity: Sparsity | None = None
    code_norm: Literal["sum", "l2", "none"] = "none"
    units: Normalizer | None = None
    partition: Partition = field(default_factory=Partition)
    widths: list[int] | None = None


@torch.no_grad()
def unflatten(flat: Flat, origin: Origin) -> Crosscoder:
    """The crosscoder of raw activations that computes the same, in ``eval()``; it takes the tensors over and copies W_enc."""
    d_in, odd = divmod(flat.W_enc.shape[0], origin.n_models)
    if odd:
        raise ValueError(
            f"an SAE of d_in={flat.W_enc.shape[0]} is not one of {origin.n_models} models of equal width"
        )
    rows = {"W_enc_rows": flat.W_enc.T.contiguous(), "W_dec": flat.W_dec}
    state = {name: tensor.view(-1, origin.n_models, d_in) for name, tensor in rows.items()}
    state |= {"b_enc": flat.b_enc, "b_dec": flat.b_dec.view(origin.n_models, d_in)}
    sparsity = _sparsity(flat, state["W_dec"], origin)
    wanted = flat.b_enc if flat.threshold is None else flat.threshold
    if (
        flat.b_enc.element_size() < 4
        and sparsity.thresholds is not None
        and not torch.equal(sparsity.thresholds, wanted)
    ):
        return unflatten(flat.float(), origin)  # a logarithm in half precision may move them by a percent
    identity = Normalizer.identity(origin.n_models, d_in)
    for name, part in (("normalizer", identity), ("sparsity", sparsity)):
        state |= {f"{name}.{key}": tensor.to(flat.b_enc) for key, tensor in part.state_dict().items()}
    with torch.device("meta"):
        crosscoder = Crosscoder(
            d_in,
            len(flat.b_enc),
            sparsity,
            n_models=origin.n_models,
            code_norm="none" if flat.k else origin.code_norm,
            partition=origin.partition,
            init=Init(same=origin.widths is None),
            widths=origin.widths,
        )
    crosscoder.load_state_dict(state, assign=True)
    crosscoder.check_padding()
    crosscoder.units = origin.units and Normalizer(origin.units.mean, origin.units.scale).to(flat.b_enc)
    return crosscoder.eval()


def _sparsity(flat: Flat, decoder: Float[Tensor, "d_sae model d_in"], origin: Origin) -> Sparsity:
    """How the thresholds came about, or a ReLU, if that gives these very thresholds; a JumpReLU that has them otherwise."""
    if flat.threshold is None:
        return TopK(flat.k or 0)
    scale = origin.units.scale if origin.units else decoder.new_ones(origin.n_models)
    norms = code_norms(decoder, scale, origin.code_norm)
    wanted = flat.threshold.clamp(min=0)
    if isinstance(origin.sparsity, Threshold):
        return Threshold.of(wanted)
    for known in (origin.sparsity, ReLU()):
        # where a JumpReLU is told of, its thresholds are not
        if known is None or any(isinstance(part, JumpReLU | TopK) for part in known.modules()):
            continue
        if torch.equal(thresholds(known, norms, wanted.dtype), wanted):
            return known
    return jumprelu(wanted, origin.sparsity)
