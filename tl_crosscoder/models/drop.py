"""Drop: which tokens never enter the store."""

from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from tl_crosscoder.models.corpus import Corpus

#: Why a token may be left out, in the order in which the reasons are asked; each token counts once.
REASONS = ("first", "special", "preamble", "template", "sink", "nonfinite")
KEPT = 255


@dataclass(frozen=True)
class Drop:
    """Left out of both models' activations, token by token.

    ``first``: position 0, whose norm is a hundred times the others' in most models.  ``special``: BOS, padding and
    end tokens.  Those that a chat template writes (role markers, end of turn) stay, since fine-tuned models keep
    much of what they learned there (Minder et al. 2025, arXiv:2504.02922); ``template`` drops them, with all else
    that no message said.  ``preamble``: the prefix that all chats share, the same numbers in each.  ``sinks``: tokens
    whose norm, in either model, exceeds this many times that model's median; None keeps them.
    """

    first: bool = True
    special: bool = True
    preamble: bool = False
    template: bool = False
    sinks: float | None = 3.0

    def __post_init__(self):
        if self.sinks is not None and not self.sinks > 0:
            raise ValueError(
                f"sinks={self.sinks}; wanted a multiple of the median norm, or None to keep all."
            )

    def reasons(self, corpus: Corpus) -> UInt8[Tensor, "batch"]:
        """For each token of the corpus the place of its reason in ``REASONS``, or ``KEPT``; norms are not known yet."""
        flags = corpus.token_flags()
        opening = torch.zeros(corpus.n_tokens, dtype=torch.bool)
        opening[corpus.offsets[:-1]] = True
        drops = {
            "first": self.first & opening,
            # A chat's opening token is its BOS; the special tokens after it are the template's.
            "special": self.special & flags["special"] & (~flags["template"] | opening),
            "preamble": self.preamble & flags["preamble"],
            "template": self.template & flags["template"],
        }
        reasons = torch.full((corpus.n_tokens,), KEPT, dtype=torch.uint8)
        for reason in reversed(drops):
            reasons[drops[reason]] = REASONS.index(reason)
        return reasons
