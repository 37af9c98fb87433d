"""What one latent does to the next token: taken out of each model at one token, many latents and tokens a forward pass."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.pair import ModelPair, Side
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.types import BASE, TUNED

SIDES: tuple[tuple[Side, int], ...] = (("base", BASE), ("tuned", TUNED))


@torch.no_grad()
def single_ablations(
    crosscoder: Crosscoder, pair: ModelPair, corpus: Corpus, probes: pd.DataFrame, *, max_tokens: int = 2048
) -> pd.DataFrame:
    """``kl_base, kl_tuned, logit_cosine`` of each probe (``latent, value, sequence, position``), in their order.

    The text up to the probe's token goes through each model; there, and nowhere else, ``value`` times the latent's decoder row of
    that model is taken out of the residual stream.  KL(ablated ‖ clean) of the next-token prediction, in nats.
    ``logit_cosine``: of the two models' changes in the logits, each centred (a constant changes no prediction); NaN where one did
    not change.
    """
    rows, effects = crosscoder.raw_rows().detach().float(), np.full((len(probes), 3), np.nan)
    length = probes["position"].to_numpy(int) + 1
    for chosen in _groups(length, max_tokens):
        here = probes.iloc[chosen]
        text, of_row = np.unique(here[["sequence", "position"]].to_numpy(int), axis=0, return_inverse=True)
        clean_batch, batch = _prefixes(corpus, text), _prefixes(corpus, text[of_row.ravel()])
        latents = torch.tensor(here["latent"].tolist(), device=rows.device)
        values = torch.tensor(here["value"].tolist(), dtype=rows.dtype, device=rows.device)
        written = crosscoder.strengths(values, latents)
        shifts = []
        for column, (side, model) in enumerate(SIDES):
            clean = _last(pair.run(clean_batch, side=side), clean_batch)[of_row.ravel()]
            row = rows[latents, model, : crosscoder.widths[model]]
            edit = _taken_out(written[:, model, None] * row, batch.lengths - 1)
            ablated = _last(pair.run(batch, edit, side=side), batch)
            effects[chosen, column] = _kl(ablated, clean).cpu().numpy()
            shifts.append((ablated - clean).cpu())
        effects[chosen, 2] = _cosine(*shifts).numpy()
    return pd.DataFrame(effects, columns=["kl_base", "kl_tuned", "logit_cosine"], index=probes.index)


def _groups(length: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Places of like length, ``max_tokens`` together with padding, or one longer one."""
    order, groups, at = np.argsort(-length, kind="stable"), [], 0
    while at < len(order):
        count = max(1, max_tokens // int(length[order[at]]))
        groups.append(order[at : at + count])
        at += count
    return groups


def _prefixes(corpus: Corpus, text: Int[np.ndarray, "seq 2"]) -> TokenBatch:
    """The beginnings of these sequences up to and with these positions, padded on the right."""
    ids = [corpus.ids_of(sequence)[: position + 1].long() for sequence, position in text.tolist()]
    lengths = torch.tensor([len(row) for row in ids])
    return TokenBatch.from_ids(
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        torch.arange(int(lengths.max())) < lengths[:, None],
    )


def _taken_out(written: Float[Tensor, "seq d_in"], last: Int[Tensor, " seq"]):
    def edit(acts: Tensor, hook: object = None) -> Tensor:  # noqa: ARG001
        row, place = torch.arange(len(acts), device=acts.device), last.to(acts.device)
        edited = acts.clone()
        edited[row, place] = (acts[row, place].float() - written.to(acts.device)).to(acts.dtype)
        return edited

    return edit


def _last(logits: Float[Tensor, "seq pos d_vocab"], batch: TokenBatch) -> Float[Tensor, "seq d_vocab"]:
    row, place = torch.arange(len(batch), device=logits.device), (batch.lengths - 1).to(logits.device)
    return logits[row, place].double()


def _kl(p: Float[Tensor, "seq d_vocab"], q: Float[Tensor, "seq d_vocab"]) -> Float[Tensor, " seq"]:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def _cosine(a: Float[Tensor, "seq d_vocab"], b: Float[Tensor, "seq d_vocab"]) -> Float[Tensor, " seq"]:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(size > 0, (a * b).sum(-1) / size, torch.nan)
