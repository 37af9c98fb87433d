"""Where in a chat each latent fires: on the template, slot by slot, on the user's words, on the assistant's."""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.chats import ASSISTANT, TEMPLATE
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.template_slots import TemplateSlots

ACTIVE = 1e-3  # scaled activations above this count
# not counted; a chat's first token; the user's; the assistant's; the template's slots from here on
OUTSIDE, BEGIN, USER, SAID, FIRST_SLOT = range(5)
#: Between the four bins of an activation relative to the largest one (arXiv:2504.02922, the authors' code).
EDGES = (0.1, 0.4, 0.7)
STRENGTHS = ("to .1", ".1 to .4", ".4 to .7", "above .7")


class TemplateTokens(Analysis):
    """``template_fraction``: of a latent's firings in chats, the share on tokens that the template wrote.

    ``template_mass``: the same of its summed activation.  ``user_fraction, assistant_fraction``: the other firings.
    ``template_enrichment``: the fraction over the share of all chat tokens that are the template's; 1 is by chance.
    ``n_chat``: firings in chats.  A latent fires where f times its decoder norms exceeds .001; a sequence's first token and
    text that is no chat do not count.  NaN where a latent never fired in a chat.  ``bos_fraction``: of the firings in chats and
    those on their first tokens the share of the latter; NaN where no first token was captured.

    Source: Minder et al. 2025, arXiv:2504.02922, template tokens; the enrichment is ours.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        corpus: Corpus,
        slots: TemplateSlots | None = None,
        *,
        max_act: Float[Tensor, " d_sae"] | None = None,
    ):
        """``max_act``: each latent's largest activation, by which firings are called weak or strong (``by_strength``)."""
        super().__init__(crosscoder)
        self.corpus, self.slots = corpus, slots or TemplateSlots((), 0, 0)
        self.kinds = _kinds(corpus, self.slots).to(crosscoder.W_dec.device)
        n_kinds = FIRST_SLOT + 1 + len(self.slots.names)
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=crosscoder.W_dec.device)
        self.tokens, self.fired, self.mass = (
            zeros(n_kinds),
            zeros(crosscoder.d_sae, n_kinds),
            zeros(crosscoder.d_sae, n_kinds),
        )
        self.max_act = None if max_act is None else max_act.to(self.mass)
        self._by_strength = zeros(crosscoder.d_sae, len(STRENGTHS), 2)

    def update(self, batch: EncodedBatch) -> None:
        if len(batch.sequence) and int(batch.sequence.min()) < 0:
            raise ValueError(
                "TemplateTokens needs to know each token's place: pass a store, not bare tensors."
            )
        place = self.corpus.offsets[batch.sequence] + batch.position
        kinds = self.kinds[place.to(self.kinds.device)]
        self.tokens += torch.bincount(kinds, minlength=len(self.tokens))
        scaled = batch.codes.scaled(self.crosscoder.selection_norms().detach())
        on = scaled > ACTIVE
        cell = batch.codes.latents[on] * len(self.tokens) + kinds[batch.tokens[on]]
        self.fired.view(-1).index_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))
        self.mass.view(-1).index_add_(0, cell, batch.codes.values[on].double())
        if self.max_act is not None:
            self._sort_by_strength(batch.codes.values[on], batch.codes.latents[on], kinds[batch.tokens[on]])

    def _sort_by_strength(self, values: Tensor, latents: Tensor, kinds: Tensor) -> None:
        assert self.max_act is not None
        chat = kinds >= USER
        values, latents, template = values[chat], latents[chat], kinds[chat] >= FIRST_SLOT
        edges = torch.tensor(EDGES, dtype=torch.float64, device=values.device)
        strength = torch.bucketize(values.double() / self.max_act[latents], edges)
        cell = (latents * len(STRENGTHS) + strength) * 2 + template
        self._by_strength.view(-1).index_add_(0, cell, torch.ones_like(values, dtype=torch.float64))

    def columns(self) -> Columns:
        n, mass = (per_kind[:, USER:].sum(1) for per_kind in (self.fired, self.mass))
        n, mass = (torch.where(n > 0, total, torch.nan) for total in (n, mass))
        fraction = self.fired[:, FIRST_SLOT:].sum(1) / n
        first = self.fired[:, BEGIN]
        begun = torch.where(self.tokens[BEGIN] > 0, first / (first + n.nan_to_num()), torch.nan)
        return {
            "n_chat": self.fired[:, USER:].sum(1),
            "template_fraction": fraction,
            "template_mass": self.mass[:, FIRST_SLOT:].sum(1) / mass,
            "user_fraction": self.fired[:, USER] / n,
            "assistant_fraction": self.fired[:, SAID] / n,
            "template_enrichment": fraction / self.base_rates()[FIRST_SLOT - USER :].sum(),
            "bos_fraction": begun,
        }

    def base_rates(self) -> Float[Tensor, " kind"]:
        """Of all chat tokens the share that is the user's, the assistant's, the template's elsewhere, and in each slot."""
        counted = self.tokens[USER:]
        return counted / counted.sum()

    def by_strength(self) -> Float[Tensor, "d_sae strength 2"]:
        """Firings in chats by their strength (``STRENGTHS``, of the latent's largest activation): elsewhere, on the template."""
        if self.max_act is None:
            raise ValueError("weak and strong are relative to the largest activations: pass max_act.")
        return self._by_strength

    def slot_fractions(self) -> Float[Tensor, "d_sae slot"]:
        """Of each latent's firings in chats the share in the template elsewhere (column 0) and in each slot."""
        n = self.fired[:, USER:].sum(1, keepdim=True)
        return self.fired[:, FIRST_SLOT:] / torch.where(n > 0, n, torch.nan)


def _kinds(corpus: Corpus, slots: TemplateSlots) -> Tensor:
    """What kind of token each of the corpus is; first tokens, and sequences that are no chat, are outside."""
    kinds, offsets = np.full(corpus.n_tokens, OUTSIDE), corpus.offsets.tolist()
    flags = corpus.flags.numpy()
    for start, stop in pairwise(offsets):
        bits = flags[start:stop]
        if (bits & (TEMPLATE | ASSISTANT)).any():
            said = np.where(bits & ASSISTANT, SAID, USER)
            slot = slots.slots(bits)
            kinds[start:stop] = np.where(slot >= 0, FIRST_SLOT + slot, said)
            kinds[start] = BEGIN
    return torch.from_numpy(kinds)
