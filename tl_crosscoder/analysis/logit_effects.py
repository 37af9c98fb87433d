"""The tokens that a latent makes likelier in each model: read straight off its decoder row, or measured in a run."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.backends import Backend
from tl_crosscoder.models.backends.unembed import unembed
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.shift import shift
from tl_crosscoder.models.tokens import TokenBatch

SIDES = ("base", "tuned")


def logit_effects(
    crosscoder: Crosscoder, pair: ModelPair, latents: Sequence[int], *, n: int = 8
) -> pd.DataFrame:
    """For each latent and model, the ``n`` tokens that ``d_j^m`` promotes and suppresses most on the direct path.

    Columns latent, model, path ("direct"), way (promotes, suppresses), rank, token, effect.  The row is scaled to norm √d_in and
    goes through the final norm and the unembedding; effect is the logit above that of a zero vector.  Only the order means
    something.  **Far from the last layer this is noise**: what a latent does there it does through later layers, see
    :func:`causal_logit_effects`.
    A row that is zero has no effects and no rows here.
    """
    raw = crosscoder.raw_rows().detach().float()
    found = []
    for m, side in enumerate(SIDES):
        rows = raw[list(latents), m, : crosscoder.widths[m]]
        lives = (rows.norm(dim=-1) > 0).nonzero()[:, 0].tolist()
        effects = direct_effects(pair.sides(side)[0], rows[lives])
        found += [
            _strongest(effects[i], latents[row], side, "direct", pair.tokenizer, n)
            for i, row in enumerate(lives)
        ]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)


def direct_effects(backend: Backend, rows: Float[Tensor, "latent d_in"]) -> Float[Tensor, "latent d_vocab"]:
    """``unembed(√d_in · d̂) − unembed(0)`` for each row: the same for rows of any length."""
    scaled = rows / rows.norm(dim=-1, keepdim=True) * rows.shape[-1] ** 0.5
    both = unembed(backend, torch.cat([scaled, torch.zeros_like(scaled[:1])])) if len(rows) else rows
    return both[:-1] - both[-1:] if len(rows) else rows


def causal_logit_effects(
    crosscoder: Crosscoder,
    pair: ModelPair,
    batch: TokenBatch,
    strengths: dict[int, float],
    *,
    n: int = 8,
) -> pd.DataFrame:
    """The same columns, measured: the mean change in log p over the batch's tokens when latent j is written at ``strengths[j]``.

    Each latent's raw row of the model is added at every real token but the first of a row; effects are of those tokens'
    predictions.
    """
    raw, where = crosscoder.raw_rows().detach().float(), batch.attention_mask & ~batch.first
    found = []
    for m, side in enumerate(SIDES):
        backend = pair.sides(side)[0]
        clean = _log_probs(backend, batch, {}, where)
        for latent, strength in strengths.items():
            row = raw[latent, m, : crosscoder.widths[m]]
            edit = {pair.hook: shift(row * strength, where)}
            change = (_log_probs(backend, batch, edit, where) - clean).mean(0)
            found.append(_strongest(change, latent, side, "causal", pair.tokenizer, n))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)


COLUMNS = ["latent", "model", "path", "way", "rank", "token", "effect"]


def _log_probs(backend: Backend, batch: TokenBatch, edits: dict[str, Any], where: Tensor) -> Tensor:
    logits = backend.run(batch, edits)
    return logits[where.to(logits.device)].float().log_softmax(-1)


def _strongest(effect: Tensor, latent: int, side: str, path: str, tokenizer: Any, n: int) -> pd.DataFrame:
    """Ids beyond the tokenizer's, which pad an embedding, are no tokens."""
    effect = effect[: len(tokenizer)].cpu()
    rows = []
    for way, sign in (("promotes", 1), ("suppresses", -1)):
        values, ids = (effect * sign).topk(min(n, len(effect)))
        for rank, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True)):
            rows.append((latent, side, path, way, rank, tokenizer.decode([token]), sign * value))
    return pd.DataFrame(rows, columns=COLUMNS)
