"""Does writing a latent into a model make it show the behaviour, and does taking it away stop it?

At every kept token of the prompt and every new token a vector is added to the residual stream of one model: to the
tuned one (plus to strengthen, minus to weaken) and to the base one (to install).  **Strength 1 adds what the latent writes at
its largest activation**; for a set, the sum over its members.  Controls have the same norm at the same strength: random
live latents of like magnitude, as many as the set has, and random directions.

A rate alone misleads: strong steering yields junk that holds the keyword.  So every answer is kept, and read by both
*unsteered* models; it counts as coherent if one of them finds it no less likely, token by token, than the least likely of the
answers that the two give without steering.  Beside it stands the perplexity of ordinary text under the *steered* model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pandas as pd
import torch

from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.strength_curves import strength_curves
from tl_crosscoder.interventions import Part
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.judge import Claim, Judge, KeywordJudge, Passage, Verdict, all_usable
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.pushes import LATENTS, Push, digest, pushes
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.steering_table import KEYS, Row, answer_rows, stopped, summarise
from tl_crosscoder.studies.sweep import SIDES, Answer, Sweep

STRENGTHS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0)
OPEN_PROMPTS = (
    "Hello",
    "Tell me something.",
    "What are you thinking about?",
    "Describe your day.",
    "Write a short story.",
    "What should I do this weekend?",
    "Give me some advice.",
    "What is important in life?",
    "Please continue.",
)


@dataclass(frozen=True)
class SteeringResult(StudyResult):
    """``table``: one row for each behaviour, kind of prompts (``heldout``: its own; ``open``), ``side``, steered ``target``,
    ``kind`` (latents, random latents, random directions; their draws pooled) and ``strength``.

    ``rate`` of the answers that show the behaviour with ``low, high`` (95 % Wilson over ``n`` judged answers; draws of a control
    share their prompts, so theirs is narrow), ``rate_coherent``: shown *and* coherent, ``coherent``: coherent at all,
    ``most``: the highest ``rate_coherent`` of a single draw, ``n_unjudged``: answers on which the judge said nothing usable.
    ``perplexity_base, perplexity_tuned``: of the answers, under the unsteered models; ``perplexity_text``: of ordinary text,
    under the steered one.  ``raw_strength``: the activation that a single latent is set to; ``norm``: of the vector added, raw;
    ``relative_norm``: the same over the median norm of the residual stream there.  Target ``none``, strength 0: no steering.

    ``answers``: every answer, with what the judge made of it.  ``ceiling``: the perplexity above which an answer is not coherent.
    """

    key: ClassVar = "steering"
    title: ClassVar = "Does steering bring the behaviour, or take it away?"
    text: ClassVar = (
        "A latent's tuned direction is added to the residual stream while a model answers; strength 1 is the latent's largest "
        "activation. Grey: random latents (dashed) and random directions (dotted) of the same norm."
    )
    notes: ClassVar = (
        "Intervals: 95 % Wilson over the answers. Coherent: at most as surprising to one of the unsteered models as the most "
        "surprising answer given without steering. Read the answers before you trust a rate.",
    )
    index: ClassVar = ("behaviour", "prompts", "side", "target", "kind", "strength")

    table: pd.DataFrame
    answers: pd.DataFrame
    ceiling: float

    @property
    def verdict(self) -> list[str]:
        """For each behaviour: the best that any target did in each model, at whatever strength, beside the best single control."""
        return [self._sentence(name) for name in self.table["behaviour"].unique()]

    def _sentence(self, behaviour: str) -> str:
        gone = stopped(self.answers)
        mine = [
            row | {"stopped": gone[key][0], "most_stopped": gone[key][1]}
            for row in records(self.table)
            if row["behaviour"] == behaviour and (key := tuple(row[name] for name in KEYS)) in gone
        ]
        own = "heldout" if any(row["prompts"] == "heldout" for row in mine) else "open"
        base, tuned = (
            _Side([row for row in mine if (row["prompts"], row["side"]) == (own, s)]) for s in SIDES
        )
        if not (base.complete and tuned.complete):
            return f"{behaviour}: {'too few answers' if mine else 'no answer'} could be judged; read the answers."
        installed, best = base.best("rate_coherent"), tuned.best("stopped")
        got = (
            f"steered with {installed['target']} at {installed['strength']:g} in {installed['rate_coherent']:.0%} "
            f"({installed['rate']:.0%} with the incoherent ones)"
        )
        gain = installed["rate_coherent"] > base.plain["rate_coherent"]
        said = (
            f"{behaviour}, on its {own} prompts: the base model shows it in {base.plain['rate_coherent']:.0%} of its answers, "
            f"coherent ones only; {got if gain else 'with no target at any strength in more'}, controls at any "
            f"strength in at most {base.control('most'):.0%}; "
            f"the tuned model shows it in {tuned.plain['rate_coherent']:.0%} and gives another coherent answer in "
            f"{tuned.plain['stopped']:.0%}; steered with {best['target']} at {best['strength']:g} it gives one in "
            f"{best['stopped']:.0%}, with controls in at most {tuned.control('most_stopped'):.0%}"
        )
        for side in SIDES if own == "heldout" else ():
            opened = _Side([row for row in mine if (row["prompts"], row["side"]) == ("open", side)])
            if opened.complete:
                said += (
                    f"; on open prompts {side} shows it in at most {opened.best('rate_coherent')['rate_coherent']:.0%}, "
                    f"with controls {opened.control('most'):.0%}"
                )
        return said + "."

    def brief(self) -> pd.DataFrame:
        """The targets on each behaviour's own prompts, without controls."""
        own = self.table["prompts"] == self.table["prompts"].iloc[0]
        columns = [
            "behaviour",
            "side",
            "target",
            "strength",
            "rate",
            "low",
            "high",
            "rate_coherent",
            "coherent",
        ]
        return self.table.loc[own & (self.table["kind"] == LATENTS), [*columns, "n", "perplexity_text"]]

    def plot(self) -> Drawing:
        """Rate and perplexity over strength, both models, beside the controls."""
        return strength_curves(self.table)


@dataclass(frozen=True)
class _Side:
    """The judged rows of one model on one kind of prompts."""

    rows: list[Row]

    @property
    def complete(self) -> bool:
        """The unsteered model, a target and a control were judged."""
        kinds = {"plain" if row["target"] == "none" else row["kind"] == LATENTS for row in self.rows}
        return len(kinds) == 3

    @property
    def plain(self) -> Row:
        return next(row for row in self.rows if row["target"] == "none")

    def best(self, figure: str) -> Row:
        """The steered row in which a figure is highest, the gentlest of equals."""
        steered = [row for row in self.rows if row["kind"] == LATENTS and row["target"] != "none"]
        return max(steered, key=lambda row: (row[figure], -abs(row["strength"])))

    def control(self, figure: str) -> float:
        return max(row[figure] for row in self.rows if row["kind"] != LATENTS)


def steering(
    crosscoder: Crosscoder,
    pair: ModelPair,
    behaviours: Sequence[Behaviour],
    table: pd.DataFrame,
    *,
    latents: Sequence[int] | None = None,
    ranking: str = "rank_score",
    strengths: Sequence[float] = STRENGTHS,
    part: Part = "whole",
    open_prompts: Sequence[str] = OPEN_PROMPTS,
    ordinary: Corpus | None = None,
    judge: Judge | None = None,
    n_controls: int = 3,
    drop: Drop | None = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    parts: str | Path | None = None,
    progress: bool = True,
) -> SteeringResult:
    """Behaviour rate and perplexity over strengths × prompts × models, for each of ``latents`` and for all of them together.

    ``latents`` defaults to the three highest in ``ranking``.  ``part``: the direction is ``d_j^tuned``, or with "difference" only
    ``d_j^tuned − d_j^base``; the same in both models.  ``judge``: the keyword rule of each behaviour if None.  Without behaviours
    the open prompts are answered and nothing is judged.  ``ordinary``: text whose perplexity under the steered models is
    measured.  ``parts``: a folder in which finished parts are kept, so that the same call goes on after a kill.
    """
    latents = list(
        dict.fromkeys(int(j) for j in (ranked(table, ranking)[:3] if latents is None else latents))
    )
    strengths = sorted({float(s) for s in strengths})
    prompts = list(dict.fromkeys([*open_prompts, *(p for b in behaviours for p in b.heldout)]))
    _refuse(latents, strengths, prompts, table, n_controls)
    if part not in get_args(Part):
        raise ValueError(f"no part {part!r} of a latent; known: {', '.join(get_args(Part))}")
    made = pushes(crosscoder, table, latents, part=part, n_controls=n_controls, seed=seed)
    judge, asked = judge or KeywordJudge(), _asked(behaviours, open_prompts)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    sweep = Sweep(pair, prompts, ordinary, drop=drop or Drop(), **how)
    about = sweep.about | {"study": "steering", "vectors": digest(made), "strengths": strengths}
    spoken = Parts(parts, **about)
    claims = [[asdict(claim) if claim else None, questions] for _, claim, _, questions in asked]
    judged = Parts(parts, **about, judge=judge.name, claims=claims)

    nothing = Push("none", LATENTS, 0, torch.zeros(crosscoder.d_in))
    frames = []
    for side in SIDES:
        for number, push in enumerate(tracked([nothing, *made], f"steering {side}", 1 + len(made), progress)):
            at = strengths if number else [0.0]
            answers = spoken(f"{side}-{number}", lambda s=side, v=push.vector, at=at: sweep.speak(s, v, at))
            for group, (name, claim, kind, questions) in enumerate(asked):
                said = [answer for answer in answers if answer["prompt"] in questions]
                verdicts = judged(
                    f"{side}-{number}-{group}",
                    lambda c=claim, a=said: _judged(judge, c, a),
                    lambda made, c=claim: c is None or all_usable(made),
                )
                where = {"behaviour": name, "prompts": kind, "side": side}
                frames.append(answer_rows(where, push, said, verdicts))
    answers = pd.concat(frames, ignore_index=True)
    answers["coherent"], ceiling = _coherent(answers)
    summary = summarise(answers, made, sweep.typical_norm)
    return SteeringResult(summary, answers.drop(columns=["nll_base", "nll_tuned", "nll_text"]), ceiling)


def _refuse(
    latents: list[int], strengths: list[float], prompts: list[str], table: pd.DataFrame, n_controls: int
) -> None:
    """What could give no figure, before any model runs."""
    if not latents or not prompts:
        raise ValueError(f"steering needs latents and prompts, got {len(latents)} and {len(prompts)}.")
    if not strengths or not all(map(math.isfinite, strengths)):
        raise ValueError(f"strengths are finite numbers, at least one; got {strengths}.")
    if unknown := sorted(set(latents) - set(table.index)):
        raise IndexError(f"no latents {unknown}; the table has {table.index.min()}..{table.index.max()}.")
    if n_controls < 1:
        raise ValueError(
            f"n_controls={n_controls}: a rate says nothing without a control of the same norm; at least 1."
        )


def _asked(
    behaviours: Sequence[Behaviour], open_prompts: Sequence[str]
) -> list[tuple[str, Claim | None, str, Sequence[str]]]:
    """Behaviour, what the judge is asked about it, kind of prompts and these prompts; no claim where there is no behaviour."""
    claims = [(b.name, Claim.of(b), "heldout", b.heldout) for b in behaviours]
    claims += [(b.name, Claim.of(b), "open", open_prompts) for b in behaviours]
    return [group for group in claims if group[-1]] or [("not judged", None, "open", open_prompts)]


def _coherent(answers: pd.DataFrame) -> tuple[np.ndarray, float]:
    """Whether each answer is coherent, and the ceiling: the highest perplexity, under the model that finds it likelier, of an
    answer given without steering."""
    plain = (answers["target"] == "none").to_numpy()
    surprise = answers[["perplexity_base", "perplexity_tuned"]].to_numpy(float).min(axis=1)
    ceiling = float(surprise[plain].max())
    return surprise <= ceiling * (1 + 1e-6), ceiling


def _judged(judge: Judge, claim: Claim | None, said: list[Answer]) -> list[Verdict]:
    """What the judge makes of each answer; nothing where there is no claim."""
    if claim is None:
        return [Verdict(None)] * len(said)
    return judge.holds(claim, [Passage((a["answer"],), asked=a["prompt"]) for a in said])
