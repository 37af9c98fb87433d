"""Do the latents that fine-tuning added live on the chat template's tokens?

Chat models keep much of what they learned at the tokens between the turns.  Here each latent's firings in chats are
counted on those tokens, slot by slot, and the latents in question are compared with the shared ones.

Source: Minder et al. 2025, arXiv:2504.02922 (40 % of their tuned-only latents fire mostly there, 67 % for a third)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from scipy import stats

from tl_crosscoder.analysis.base import run
from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.analysis.template_tokens import STRENGTHS, TemplateTokens
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.template import template_figure
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.template_slots import TemplateSlots
from tl_crosscoder.studies.by_latent import by_latent
from tl_crosscoder.studies.progress import TrackedBatches
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.result import StudyResult

MOSTLY, THIRD = 0.5, 1 / 3
MEDIANS = ("template_fraction", "template_enrichment", "user_fraction", "assistant_fraction", "bos_fraction")


@dataclass(frozen=True)
class TemplateResult(StudyResult):
    """``table``: for the latents in question, the shared and all live ones, the share that fires ``mostly`` (more than half)
    and for at least a ``third`` on the template, with 95 % Wilson intervals, and median fraction and enrichment.

    ``latents``: the fractions of each live latent.  ``slots``: each place in the template with its token, its share of the chat
    tokens, and the mean share of firings there.  ``strengths``: for each group and strength of a firing (of the latent's largest
    activation) the firings ``n`` of all its latents, and the ``share`` of them on the template.  ``counts``: what there was, and
    ``why`` where there was nothing to count."""

    key: ClassVar = "template"
    title: ClassVar = "Do they live on the chat template?"
    text: ClassVar = (
        "Where in a chat the latents fire: on the tokens that the template writes, or on what was said."
    )
    notes: ClassVar = (
        "Enrichment: a latent's share of firings on the template over the template's share of the tokens.",
    )
    index: ClassVar = ("latents",)

    table: pd.DataFrame
    latents: pd.DataFrame
    slots: pd.DataFrame
    strengths: pd.DataFrame
    counts: dict[str, Any]

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        if self.counts["why"]:
            return f"Nothing to count: {self.counts['why']}"
        asked, shared = (self.table.iloc[i] for i in (0, 1))
        text = f"Of {asked['n']:,} {asked['latents']} "
        if not asked["n"]:
            return text + f"none fired {self.counts['least']} times in chats."
        span = f"{asked['mostly_low']:.0%} to {asked['mostly_high']:.0%}"
        text += f"{asked['mostly']:.0%} ({span}) fire mostly on the template's tokens and {asked['third']:.0%} for a third"
        if shared["n"]:
            text += f"; of {shared['n']:,} shared latents {shared['mostly']:.0%} and {shared['third']:.0%}"
        if few := self.counts["too_few"]:
            text += (
                f"; {few} more, which fired fewer than {self.counts['least']} times in chats, do not count"
            )
        text += f". The template writes {self.counts['template_rate']:.0%} of the chat tokens."
        return text + self._strong(asked["latents"])

    def _strong(self, group: str) -> str:
        """Where the weak and the strong firings of a group are, beside the shared ones'."""
        share = {(row["latents"], row["strength"]): row["share"] for row in records(self.strengths)}
        weak, strong = (share.get((group, s)) for s in (STRENGTHS[0], STRENGTHS[-1]))
        if weak is None or strong is None:
            return ""
        text = f" Of their weak firings ({STRENGTHS[0]} of the largest activation) {weak:.0%} are there, of the strong ones "
        shared = share.get(("shared", STRENGTHS[-1]))
        beside = "" if shared is None else f" (shared latents {shared:.0%})"
        return f"{text}({STRENGTHS[-1]}) {strong:.0%}{beside}."

    def plot(self) -> Drawing:
        """The distribution of the template's share, and the share of firings in each slot and at each strength."""
        return template_figure(self.latents, self.slots, self.strengths)


def template_tokens(
    crosscoder: Crosscoder,
    store: PairedActivations,
    table: pd.DataFrame,
    *,
    ranking: str = "rank_score",
    calls: Sequence[int] | None = None,
    n_top: int = 30,
    least: int = 20,
    progress: bool = True,
) -> TemplateResult:
    """Where in the store's chats each latent fires, in one pass.

    ``calls``: the latents in question; by default those of class tuned-only, and where there are none the ``n_top`` highest in
    ``ranking``.  Groups count latents with at least ``least`` firings in chats.  Without chats, or a template, the result says so.
    """
    table = by_latent(table, crosscoder.d_sae)
    flags = store.corpus.token_flags()
    if not flags["template"].any():
        why = "the text has no token of a chat template (no chats, or a tokenizer without a template)."
        return _nothing(why, least)
    slots = _slots(store)
    largest = torch.tensor(table["max_act"].to_numpy(float)) if "max_act" in table else None
    analysis = TemplateTokens(crosscoder, store.corpus, slots, max_act=largest)
    run(crosscoder, TrackedBatches(store, "reading chats", progress), [analysis])
    if not analysis.tokens[1:].sum():
        return _nothing("no token of a chat was kept in these activations.", least)
    columns = {name: values.cpu().numpy() for name, values in analysis.columns().items()}
    frame: Any = pd.DataFrame(columns, index=pd.RangeIndex(crosscoder.d_sae, name="latent"))
    frame["class"] = table["class"].to_numpy()
    chosen, words = _called(table, calls, ranking, n_top)
    frame["called"] = frame.index.isin(chosen)
    enough = frame["n_chat"] >= least
    groups = {
        words: frame["called"],
        "shared": (frame["class"] == "shared") & ~frame["called"],
        "all live": frame["n_chat"] > 0,
    }
    rows = [{"latents": name, **_group(frame[mask & enough])} for name, mask in groups.items()]
    strengths = [] if largest is None else _by_strength(analysis, {n: m & enough for n, m in groups.items()})
    rates = analysis.base_rates().cpu().numpy()
    counts = {"chat_tokens": int(analysis.tokens[1:].sum()), "template_rate": float(rates[2:].sum())}
    counts |= {"too_few": int((frame["called"] & ~enough).sum()), "least": least, "why": ""}
    fractions = analysis.slot_fractions().cpu().numpy()
    names = ["(elsewhere)", *(slots.names if slots else ())]
    places = [
        {
            "slot": i,
            "token": name,
            "share_of_tokens": float(rates[2 + i]),
            "called": _mean(fractions[(frame["called"] & enough).to_numpy(), i]),
            "shared": _mean(fractions[(groups["shared"] & enough).to_numpy(), i]),
        }
        for i, name in enumerate(names)
    ]
    alive = frame[frame["n_chat"] > 0].assign(enough=enough)
    return TemplateResult(
        pd.DataFrame(rows), alive.reset_index(), pd.DataFrame(places), pd.DataFrame(strengths), counts
    )


def _by_strength(analysis: TemplateTokens, groups: dict[str, Any]) -> list[dict[str, Any]]:
    fired, rows = analysis.by_strength().cpu().numpy(), []
    for name, mask in groups.items():
        for strength, (other, template) in zip(STRENGTHS, fired[mask.to_numpy(bool)].sum(0), strict=True):
            n = other + template
            rows.append(
                {"latents": name, "strength": strength, "n": int(n), "share": template / n if n else np.nan}
            )
    return rows


def _slots(store: PairedActivations) -> TemplateSlots | None:
    """None where the store came without its tokenizer: the template's tokens are known by their flags, not by their slots."""
    try:
        return TemplateSlots.of(store.tokenizer)
    except ValueError:
        return None


def _called(table: Any, calls: Sequence[int] | None, ranking: str, n_top: int) -> tuple[list[int], str]:
    if calls is not None:
        return [int(j) for j in calls], "chosen latents"
    called = table.index[table["class"] == "tuned_only"].tolist()
    if called:
        return called, "tuned-only latents"
    return ranked(table, ranking)[:n_top], f"latents highest in {ranking} (none is tuned-only by its norms)"


def _group(frame: Any) -> dict[str, Any]:
    n, fraction = len(frame), frame["template_fraction"]
    row: dict[str, Any] = {"n": n}
    for name, hits in (("mostly", int((fraction > MOSTLY).sum())), ("third", int((fraction >= THIRD).sum()))):
        interval = stats.binomtest(hits, n).proportion_ci(method="wilson") if n else None
        row[name] = hits / n if n else np.nan
        row |= {
            f"{name}_low": interval.low if interval else np.nan,
            f"{name}_high": interval.high if interval else np.nan,
        }
    for name in MEDIANS:
        row[name] = float(frame[name].median()) if n else np.nan
    return row


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan


def _nothing(why: str, least: int) -> TemplateResult:
    empty = pd.DataFrame(
        [{"latents": name, **_group(_no_latents())} for name in ("tuned-only latents", "shared", "all live")]
    )
    counts = {"chat_tokens": 0, "template_rate": None, "too_few": 0, "least": least, "why": why}
    return TemplateResult(empty, _no_latents(), pd.DataFrame(), pd.DataFrame(), counts)


def _no_latents() -> pd.DataFrame:
    names = MEDIANS
    return pd.DataFrame({name: np.zeros(0) for name in names})
