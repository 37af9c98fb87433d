"""What does a latent fire on, in words, and do the words tell where it fires?

An explainer sees a latent's strongest passages, its tokens marked, and says what they have in common.  A judge that sees only
these words and unmarked, held-out passages says where the latent fires: passages from each bin of activation, and passages in which
it is silent, *random* ones and *similar* ones (around a token of the kind that excites it).  For each bin
``accuracy = (share of the bin's passages told apart + share of the silent ones) / 2``; a latent's score is the mean over bins.
A coin, or one answer to everything, has .5.  So, nearly, has the description of another latent, which is the control.

Source: detection scoring after Paulo et al. 2024, arXiv:2410.13928, and its use in Minder et al. 2025, arXiv:2504.02922.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.detection import detection_bars
from tl_crosscoder.figures.text import visible
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.studies.intervals import t_interval
from tl_crosscoder.studies.judge import Claim, Explainer, Judge, Passage, TokenJudge, all_usable
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.passages import BINS, Passages
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.result import StudyResult

LEAST = 2  # judged passages without which a bin has no accuracy
SILENT = ("random", "similar")
PROMOTED = 3  # tokens shown in the table, of those in ``effects``


@dataclass(frozen=True)
class ExplainResult(StudyResult):
    """``table``: a row a latent: ``group, description``, the scores against random and similar silent passages, ``score_shuffled``
    (another latent's description, random ones), and how many passages there were and ``n_unjudged`` of them.  NaN where too few.

    ``bins``: latent, bin, silent, accuracy and the passages judged on both sides.  ``groups``: mean score over latents with its
    95 % interval (Student's t).  ``unusable``: passages on which the judge said something else than yes or no, and what.
    ``effects``: the tokens that a latent makes likelier, :func:`~tl_crosscoder.analysis.logit_effects.logit_effects` or
    ``causal_logit_effects``, where models were at hand; the first of them are in the table too, ``promotes_base, promotes_tuned``
    (the causal ones where both were asked for).
    """

    key: ClassVar = "explain"
    title: ClassVar = "What the latents fire on, in words"
    text: ClassVar = (
        "Each description was made from a latent's strongest passages. Its score says how well it tells, on other text, "
        "where the latent fires: 0.5 is a coin."
    )
    notes: ClassVar = (
        "Similar: silent passages around a token that excites the latent elsewhere. Shuffled: scored with another latent's words.",
    )
    index: ClassVar = ("latent",)

    table: pd.DataFrame
    bins: pd.DataFrame
    groups: pd.DataFrame
    unusable: pd.DataFrame
    effects: pd.DataFrame

    @property
    def verdict(self) -> list[str]:
        """A sentence for each group of latents."""
        return [self._sentence(name) for name in dict.fromkeys(self.table["group"])]

    def _sentence(self, group: str) -> str:
        said = {row["against"]: row for row in records(self.groups) if row["group"] == group}
        latents = list(self.table["group"]).count(group)
        if not said or said["random"]["mean"] is None:
            return f"{group}: none of {latents} latents fires in enough passages to be scored."
        parts = [
            f"{row['mean']:.2f} {_names(name)} ({_interval(row)})"
            for name, row in said.items()
            if row["mean"] is not None
        ]
        return (
            f"{group}: detection score "
            + ", ".join(parts)
            + f"; {said['random']['n']} of {latents} latents scored."
        )

    def plot(self) -> Drawing:
        """Mean scores of the groups, and accuracy over bins of activation."""
        return detection_bars(self.groups, self.bins.merge(self.table[["latent", "group"]], on="latent"))


def explain(
    crosscoder: Crosscoder,
    store: PairedActivations,
    groups: Mapping[str, Sequence[int]] | Sequence[int],
    *,
    explainer: Explainer | None = None,
    judge: Judge | None = None,
    n_examples: int = 12,
    per_bin: int = 5,
    n_silent: int = 10,
    max_tokens: int = 500_000,
    effects: pd.DataFrame | None = None,
    seed: int = 0,
    parts: str | Path | None = None,
) -> ExplainResult:
    """Descriptions and detection scores of latents, in named ``groups`` or as one list.

    ``explainer`` and ``judge``: tokens alone (:class:`TokenJudge`) if None.  ``store``: held-out activations; half of its
    conversations are shown, the other half judged.  A latent that is in several groups counts in the first.  ``parts``: a folder in
    which each latent's description and verdicts are kept, so that the same call goes on after a kill.
    """
    group_of = _grouped(groups)
    latents = list(group_of)
    if not latents or not all(0 <= j < crosscoder.d_sae for j in latents):
        raise IndexError(f"explain wants latents of 0..{crosscoder.d_sae - 1}, at least one; got {latents}.")
    explainer, judge = explainer or TokenJudge(), judge or TokenJudge()
    passages = Passages(crosscoder, store, latents, max_tokens=max_tokens, seed=seed)
    about = {"study": "explain", "passages": passages.digest, "seed": seed, "explainer": explainer.name}
    described = Parts(parts, **about, n=n_examples)

    claims: dict[int, Claim] = {}
    for j in latents:
        describe = lambda j=j: _described(explainer, passages.strongest(j, n_examples))
        found = described(f"{j}", describe, lambda made: made is not None)
        if found is not None:
            claims[j] = Claim(found["text"], tuple(found["words"]))
    other = dict(zip(claims, [*list(claims)[1:], *list(claims)[:1]], strict=True))  # the next one's words
    told = [[j, asdict(claim)] for j, claim in claims.items()]
    judged = Parts(
        parts, **about, judge=judge.name, n=[n_examples, per_bin, n_silent], latents=latents, told=told
    )
    rows, bins, unusable = [], [], []
    for j in latents:
        rng = np.random.default_rng([seed, j])
        fires, silent = passages.firing(j, per_bin, rng), passages.silent(j, n_silent, rng)
        asked = {**fires, **silent}
        claim, wrong = claims.get(j), claims.get(other.get(j, j)) if len(claims) > 1 else None
        verdicts = judged(f"{j}", lambda c=claim, a=asked: _verdicts(judge, c, a), _usable)
        shuffled = judged(f"{j}-shuffled", lambda c=wrong, a=asked: _verdicts(judge, c, a), _usable)
        mine = {(b, s): _accuracy(verdicts, b, s) for s in SILENT for b in BINS}
        null = [_accuracy(shuffled, b, "random")[0] for b in BINS]
        bins += [
            {"latent": j, "bin": b, "against": s, "accuracy": value, "n_firing": n, "n_silent": m}
            for (b, s), (value, n, m) in mine.items()
        ]
        lost = _unjudged(verdicts, asked)
        unusable += [{"latent": j, "passage": passage.text, "said": said} for passage, said in lost]
        scores = {f"score_{s}": _mean([mine[b, s][0] for b in BINS]) for s in SILENT}
        counts = {"n_firing": sum(map(len, fires.values()))} | {f"n_{s}": len(silent[s]) for s in SILENT}
        rows.append(
            {"latent": j, "group": group_of[j], "description": claim.text if claim else "", **scores}
            | {"score_shuffled": _mean(null), **counts, "n_unjudged": len(lost)}
        )
    table = pd.DataFrame(rows)
    means = _group_means(table)
    if effects is not None:
        table = table.assign(**_promoted(effects, latents))
    known = pd.DataFrame() if effects is None else effects
    return ExplainResult(table, pd.DataFrame(bins), means, pd.DataFrame(unusable), known)


def _grouped(groups: Mapping[str, Sequence[int]] | Sequence[int]) -> dict[int, str]:
    """Latent -> the first group that has it, in the order of the groups."""
    named = groups if isinstance(groups, Mapping) else {"latents": groups}
    group_of: dict[int, str] = {}
    for name, latents in named.items():
        for latent in latents:
            group_of.setdefault(int(latent), name)
    return group_of


def _unjudged(verdicts: dict[str, list[Any]], asked: dict[str, list[Passage]]) -> list[tuple[Passage, str]]:
    """The passages without a usable verdict, and what the judge said instead."""
    pairs = [(p, v) for kind, made in verdicts.items() for p, v in zip(asked[kind], made, strict=False)]
    return [(passage, said) for passage, (holds, said) in pairs if holds is None]


def _usable(verdicts: dict[str, list[Any]]) -> bool:
    """Whether every passage has a verdict."""
    return all(map(all_usable, verdicts.values()))


def _promoted(effects: pd.DataFrame, latents: list[int]) -> dict[str, list[str]]:
    """For each model the first tokens that each latent promotes; nothing where it writes nothing or was not asked."""
    first: Any = effects[(effects["way"] == "promotes") & (effects["rank"] < PROMOTED)]
    columns = {}
    for side in ("base", "tuned"):
        words: dict[Any, str] = {}
        for path in ("direct", "causal"):
            rows: Any = first[(first["model"] == side) & (first["path"] == path)]
            words |= {
                j: " ".join(f"‹{visible(t).replace(chr(10), '↵')}›" for t in each["token"])
                for j, each in rows.groupby("latent")
            }
        columns[f"promotes_{side}"] = [words.get(j, "") for j in latents]
    return columns


def _described(explainer: Explainer, examples: list[Passage]) -> dict[str, Any] | None:
    claim = explainer.describe(examples) if examples else None
    return None if claim is None else asdict(claim)


def _verdicts(judge: Judge, claim: Claim | None, asked: dict[str, list[Passage]]) -> dict[str, list[Any]]:
    """One request for all: a judge that sees no activations, in an order that tells nothing it could use."""
    if claim is None:
        return {kind: [] for kind in asked}
    flat = [(kind, Passage(p.tokens)) for kind, some in asked.items() for p in some]
    said = judge.holds(
        Claim(f"The latent described here fires in the text: {claim.text}", claim.words), [p for _, p in flat]
    )
    found: dict[str, list[Any]] = {kind: [] for kind in asked}
    for (kind, _), verdict in zip(flat, said, strict=True):
        found[kind].append(verdict)
    return found


def _accuracy(verdicts: dict[str, list[Any]], fires: str, silent: str) -> tuple[float, int, int]:
    """(share of firing passages called so + share of silent ones called so) / 2, and how many of both were judged."""
    yes = [holds for holds, _ in verdicts[fires] if holds is not None]
    no = [not holds for holds, _ in verdicts[silent] if holds is not None]
    if len(yes) < LEAST or len(no) < LEAST:
        return math.nan, len(yes), len(no)
    return (sum(yes) / len(yes) + sum(no) / len(no)) / 2, len(yes), len(no)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _group_means(table: pd.DataFrame) -> pd.DataFrame:
    """A row a group and kind of score: the mean over latents, its interval, and over how many."""
    rows = []
    for group in dict.fromkeys(table["group"]):
        for against in (*SILENT, "shuffled"):
            scores = table.loc[table["group"] == group, f"score_{against}"].to_numpy(float)
            scores = scores[~np.isnan(scores)]
            low, high = t_interval(scores)
            row = {
                "group": group,
                "against": against,
                "mean": float(scores.mean()) if len(scores) else math.nan,
            }
            rows.append(row | {"low": low, "high": high, "n": len(scores)})
    return pd.DataFrame(rows)


def _names(against: str) -> str:
    return "with another latent's words" if against == "shuffled" else f"against {against} silent passages"


def _interval(row: dict[str, Any]) -> str:
    return "one latent" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
