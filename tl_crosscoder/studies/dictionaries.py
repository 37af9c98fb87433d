"""What a dictionary says about the change from base to tuned: a crosscoder's, one of the difference, or an SAE's of one model."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.analysis.base import evaluating
from tl_crosscoder.dictionary.codes import Codes
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import refuse_unlike

#: what the dictionary is given: both models at once, tuned − base, or each model by itself
Reads = Literal["both", "difference", "each"]


class Dictionary:
    """The change in raw units, latent by latent: ``Σ_j f_j (d_j^tuned − d_j^base)`` of a crosscoder.

    A dictionary of one model says by ``reads`` what it was made for: the "difference", whose rows are the change; or, as an SAE,
    "each" model by itself: the change is what its codes of the tuned activations write less what those of the base activations
    do, ``Σ_j (f_j(h_tuned) − f_j(h_base)) d_j``.
    """

    def __init__(self, crosscoder: Crosscoder, reads: Reads | None = None):
        self.reads: Reads = reads or ("both" if crosscoder.n_models > 1 else "difference")
        if (self.reads == "both") != (crosscoder.n_models > 1):
            raise ValueError(
                f"reads={reads!r} does not fit a dictionary of {crosscoder.n_models} model(s): a crosscoder reads both, "
                "a dictionary of one model their difference, or each by itself."
            )
        refuse_unlike(crosscoder, "the change from base to tuned")
        self.crosscoder = crosscoder
        rows = crosscoder.raw_rows().detach()
        with evaluating(crosscoder):
            bias = crosscoder.decode(rows.new_zeros(1, crosscoder.d_sae))[0]
        if self.reads == "both":
            self.rows, self.change, bias = (
                rows[:, TUNED],
                rows[:, TUNED] - rows[:, BASE],
                bias[TUNED] - bias[BASE],
            )
        else:
            self.rows, self.change, bias = rows[:, 0], rows[:, 0], bias[0]
        #: what is added to the base activations where nothing fires
        self.bias: Float[Tensor, " d_in"] = torch.zeros_like(bias) if self.reads == "each" else bias

    def codes(
        self, acts: Float[Tensor, "token model d_in"], most: int | None = None
    ) -> tuple[Codes, Codes | None]:
        """The codes that write the change and, of an SAE, those to be taken off: tuned's and base's.

        ``most``: of each only so many active pairs of token and latent, those that write most.
        """
        x = acts.float()
        given = {
            "both": [x],
            "difference": [x[:, [TUNED]] - x[:, [BASE]]],
            "each": [x[:, [TUNED]], x[:, [BASE]]],
        }
        with evaluating(self.crosscoder):
            found = [self._strongest(self.crosscoder.encode_sparse(part), most) for part in given[self.reads]]
        return found[0], found[1] if len(found) > 1 else None

    def written(
        self,
        codes: tuple[Codes, Codes | None],
        latents: Bool[Tensor, " d_sae"] | None = None,
        *,
        additive: bool = False,
    ) -> Float[Tensor, "token d_in"]:
        """The change that ``latents`` (None: all) make; ``additive``: what they write into the tuned model, nothing taken off."""
        more, less = _only(codes[0], latents), codes[1]
        if additive:
            return more.of_model(TUNED).decode(self.rows)
        if more.gates is not None:  # each model chose for itself
            base = more.of_model(BASE).decode(self.rows - self.change)
            return more.of_model(TUNED).decode(self.rows) - base
        total = more.decode(self.change)
        return total if less is None else total - _only(less, latents).decode(self.change)

    def _strongest(self, codes: Codes, most: int | None) -> Codes:
        if most is None or codes.n_active <= most:
            return codes
        written = codes.scaled(self.crosscoder.selection_norms().detach())
        kept = torch.zeros_like(codes.values)
        best = written.topk(most).indices
        kept[best] = codes.values[best]
        return codes.with_values(kept)


def n_active(codes: tuple[Codes, Codes | None]) -> int:
    """Active pairs of token and latent; of an SAE, on the tuned activations."""
    return int((codes[0].values > 0).sum())


def _only(codes: Codes, latents: Tensor | None) -> Codes:
    return codes if latents is None else codes.with_values(codes.values * latents[codes.latents])
