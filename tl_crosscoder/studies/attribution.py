"""Which latents a prediction rests on: a difference of two logits, attributed to latents in both models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.base import evaluating
from tl_crosscoder.dictionary.codes import Codes
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.figures import Drawing, NotDrawn
from tl_crosscoder.figures.drawing import BLUE, FAINT, ORANGE
from tl_crosscoder.interventions import ablate
from tl_crosscoder.models.backends.base import LiveBackend
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair, Side
from tl_crosscoder.models.tokens import TokenBatch, Tokens, as_batch
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.where import kept_tokens
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import padded

SIDES: tuple[tuple[Side, int], ...] = (("base", BASE), ("tuned", TUNED))
ROWS_AT_ONCE = 64
#: one token id for every text, or one a text
Ids = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class AttributionResult(StudyResult):
    """``table``: one row a latent that was active, largest effect first.

    ``gradient_base, gradient_tuned``: gradient × activation, ``Σ f_j ⟨d_j^m, ∂(logit difference)/∂h⟩``, in logits; ``exact_base,
    exact_tuned``: how far the logit difference falls when the latent is ablated in that model (NaN where it was not tried).
    ``totals``: for each model the clean logit difference, and how much of ``⟨∂/∂h, h⟩`` goes to latents, to the decoder's bias and
    to the crosscoder's error; all are means over the texts.
    """

    key: ClassVar = "attribution"
    title: ClassVar = "Which latents a prediction rests on"
    text: ClassVar = "A difference of two logits, split among the latents that were active before it."
    notes: ClassVar = (
        "Gradient × activation is the effect to first order; exact: the latent ablated, model run again.",
    )
    index: ClassVar = ("latent",)

    table: pd.DataFrame
    totals: pd.DataFrame

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        totals = self.totals.set_index("model")
        clean = totals["logit_difference"]
        said = f"The logits differ by {clean['base']:.3g} in the base model and {clean['tuned']:.3g} in the tuned one"
        if self.table.empty:
            return f"{said}; no latent was active."
        first = self.table.loc[self.table["gradient_tuned"].abs().idxmax()]
        share = totals.loc["tuned", "latents"]
        exact = (
            f", {first['exact_tuned']:.3g} when ablated"
            if first["exact_tuned"] == first["exact_tuned"]
            else ""
        )
        return (
            f"{said}; in the tuned model latents hold {share:.3g} of its first-order {totals.loc['tuned', 'total']:.3g}, latent "
            f"{int(first['latent'])} the most: {first['gradient_tuned']:.3g} by gradient{exact}."
        )

    def plot(self) -> Drawing:
        """The latents with the largest effects, in both models."""
        tried = self.table.dropna(subset=["exact_base", "exact_tuned"]).head(12)
        if tried.empty:
            raise NotDrawn("no latent was ablated")

        def draw(figure: Any) -> None:
            axes, places = figure.subplots(), np.arange(len(tried))
            for offset, name, colour in ((-0.2, "base", BLUE), (0.2, "tuned", ORANGE)):
                axes.bar(
                    places + offset, tried[f"exact_{name}"], width=0.36, color=colour, linewidth=0, label=name
                )
                axes.plot(places + offset, tried[f"gradient_{name}"], "_", color=FAINT, markersize=9)
            axes.axhline(0, color=FAINT, linewidth=0.6)
            axes.set_xticks(places, [str(latent) for latent in tried["latent"]], rotation=45, ha="right")
            axes.set_xlabel("latent (dash: by gradient)")
            axes.set_ylabel("logit difference lost when ablated")
            axes.legend(handlelength=1)

        return Drawing(draw, (7.5, 2.8))


def attribution(
    crosscoder: Crosscoder,
    pair: ModelPair,
    tokens: Tokens,
    correct: Ids,
    wrong: Ids,
    *,
    top: int = 20,
    drop: Drop | None = None,
) -> AttributionResult:
    """The difference ``logit[correct] − logit[wrong]`` after each text's last token, attributed to latents in both models.

    ``correct`` and ``wrong``: token ids, one for all texts or one a text.  By gradient × activation for every active latent, and
    exactly, by ablating it, for the ``top`` largest of either model.  Tokens that ``drop`` keeps out of training are left alone.
    """
    batch = as_batch(tokens, pair.tokenizer)
    wanted, other = (_ids(value, name, batch) for value, name in ((correct, "correct"), (wrong, "wrong")))
    rows = crosscoder.raw_rows().detach().float()
    acts = pair.capture(batch).to(rows.device)
    where = kept_tokens(batch, acts, drop or Drop())
    x = acts[where].float()
    with evaluating(crosscoder), torch.no_grad():
        codes = crosscoder.encode_sparse(x)
        recon = crosscoder.decode(codes).float()
    effects, totals = {}, []
    for side, model in SIDES:
        clean, gradient = _gradient(pair, side, batch, wanted, other)
        g = padded(gradient, crosscoder.d_in).to(rows.device)[where]
        effects[f"gradient_{side}"] = _by_latent(codes.of_model(model), rows[:, model], g) / len(batch)
        latents = float(effects[f"gradient_{side}"].sum())
        error = float(((x - recon)[:, model] * g).sum()) / len(batch)
        total = float((x[:, model] * g).sum()) / len(batch)
        means = {"logit_difference": float(clean.mean()), "total": total, "latents": latents, "error": error}
        totals.append({"model": side, **means, "bias": total - latents - error})
    table = pd.DataFrame({name: value.numpy() for name, value in effects.items()}).rename_axis("latent")
    table = table[codes.fired().cpu().numpy()]
    table = table.assign(size=table.abs().max(axis=1)).sort_values("size", ascending=False, kind="stable")
    tried = table.index[:top].tolist()
    for side, _ in SIDES:
        lost = _ablated(crosscoder, pair, side, batch, acts, where, tried, (wanted, other))
        table[f"exact_{side}"] = pd.Series(lost, index=tried, dtype=float)
    return AttributionResult(table.drop(columns="size").reset_index(), pd.DataFrame(totals))


def _ids(value: Ids, name: str, batch: TokenBatch) -> Tensor:
    """One id a text."""
    ids = torch.as_tensor(value).reshape(-1)
    if len(ids) not in (1, len(batch)):
        raise ShapeMismatch(
            f"{name} wants one token id, or one for each of {len(batch)} texts; got {len(ids)}."
        )
    return ids.expand(len(batch))


def _difference(logits: Tensor, batch: TokenBatch, correct: Tensor, wrong: Tensor) -> Float[Tensor, " seq"]:
    """After each text's last real token."""
    place = batch.attention_mask.shape[1] - 1 - batch.attention_mask.flip(1).long().argmax(1)
    row = torch.arange(len(batch), device=logits.device)
    last = logits[row, place.to(logits.device)].float()
    return last[row, correct.to(logits.device)] - last[row, wrong.to(logits.device)]


def _gradient(
    pair: ModelPair, side: Side, batch: TokenBatch, correct: Tensor, wrong: Tensor
) -> tuple[Float[Tensor, " seq"], Float[Tensor, "seq pos d_in"]]:
    """The clean logit differences of one model, and the gradient of each to its own activations at the hook."""
    backend = pair.sides(side)[0]
    if not isinstance(backend, LiveBackend):
        raise TypeError(f"{type(backend).__name__} cannot run with gradients; wanted a LiveBackend")
    leaves: list[Tensor] = []

    def leaf(acts: Tensor, hook: object = None) -> Tensor:  # noqa: ARG001
        leaves[:] = [acts.detach().float().requires_grad_()]
        return leaves[0].to(acts.dtype)

    with torch.enable_grad(), backend.attached({pair.hook: leaf}, lambda *_: None):
        logits, _ = backend.run_with_cache(batch, lambda _: False)
        clean = _difference(logits, batch, correct, wrong)
        [gradient] = torch.autograd.grad(clean.sum(), leaves)
    return clean.detach(), gradient


def _by_latent(
    codes: Codes, rows: Float[Tensor, "d_sae d_in"], g: Float[Tensor, "token d_in"]
) -> Float[Tensor, " d_sae"]:
    """``Σ_tokens f_j ⟨d_j, g⟩``."""
    effect = codes.values.float() * (rows[codes.latents] * g[codes.tokens()]).sum(-1)
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    return total.index_add_(0, codes.latents, effect.double()).cpu()


def _ablated(crosscoder, pair, side, batch, acts, where, tried, ids) -> list[float]:
    """How far the mean logit difference falls with each of the latents ablated, many of them in one forward pass."""
    model, n = (BASE if side == "base" else TUNED), len(batch)
    clean = _difference(pair.run(batch, side=side), batch, *ids)
    at_once, lost = max(1, ROWS_AT_ONCE // n), []
    for start in range(0, len(tried), at_once):
        some = tried[start : start + at_once]
        many = batch.rows(list(range(n)) * len(some))
        chosen = torch.zeros(len(some) * n, crosscoder.d_sae, dtype=torch.bool)
        chosen[torch.arange(len(chosen)), torch.tensor(some).repeat_interleave(n)] = True
        others = acts[:, :, 1 - model].repeat(len(some), 1, 1)
        edit = ablate(crosscoder, chosen, others, model=model, mask=where.repeat(len(some), 1))
        after = _difference(pair.run(many, edit, side), many, *(value.repeat(len(some)) for value in ids))
        lost += (clean - after.view(len(some), n)).mean(1).tolist()
    return lost
