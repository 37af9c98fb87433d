"""Does the tuned model need the gated latents for the task, more than it needs others like them?

The latents are taken out of the tuned model at every kept token, while it answers, with the base model in lockstep.
Beside the gated set: matched sets of other latents, and the gated latents' own activations on random directions of the same
length.  The same prompts in every condition, greedy answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from tl_crosscoder.analysis.matching_nulls import p_value
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.interventions import Part, ablate
from tl_crosscoder.models.answers import own_answers, turn_ends
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.gate_audit.matched_sets import matched_sets, turned
from tl_crosscoder.studies.gate_audit.tasks import Task
from tl_crosscoder.studies.predictions import kl, log_probs
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.statistics import (
    cohens_dz,
    discordance_of,
    equivalence_p,
    gap_interval,
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_effect,
    signed_rank_p,
)
from tl_crosscoder.studies.where import kept_tokens
from tl_crosscoder.types import BASE

ROWS_AT_ONCE = 64
NONE, GATED, MATCHED, TURNED = "none", "gated", "matched", "turned"


@dataclass(frozen=True)
class Condition:
    """What is taken out: ``latents`` of ``crosscoder``; ``kind`` none, gated, matched or turned (random directions)."""

    kind: str
    latents: list[int]
    crosscoder: Crosscoder


def conditions(
    crosscoder: Crosscoder,
    table: pd.DataFrame,
    gated: list[int],
    alive: Sequence[int],
    *,
    n_matched: int,
    n_turned: int,
    seed: int,
) -> tuple[list[Condition], float]:
    """Nothing, the gated set and its controls; and the share of the controls' members outside the caliper."""
    sets, outside = matched_sets(table, gated, alive, n_draws=n_matched, seed=seed)
    made = [Condition(NONE, [], crosscoder), Condition(GATED, gated, crosscoder)]
    made += [Condition(MATCHED, latents, crosscoder) for latents in sets]
    made += [Condition(TURNED, gated, turned(crosscoder, gated, seed + n)) for n in range(n_turned)]
    return made, outside


class Subject:
    """The tuned model on some prompts, under any condition."""

    def __init__(
        self,
        pair: ModelPair,
        prompts: Sequence[str],
        gold: Sequence[str] | None,
        part: Part,
        drop: Drop,
        n: int,
    ):
        self.part: Part = part
        self.pair, self.drop, self.n = pair, drop, n
        asked = Corpus.prompts(list(prompts), pair.tokenizer)
        self.batch = asked.batch(range(len(asked)), pad="left")
        self.mask = kept_tokens(self.batch, pair.capture(self.batch), drop)
        self.stops = turn_ends(pair)
        if gold is None:
            both = own_answers(pair, asked, max_new_tokens=n)
            self.text = both.select(range(len(asked), len(both)))
        else:
            told = [
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
                for q, a in zip(prompts, gold, strict=True)
            ]
            self.text = Corpus.from_chats(told, pair.tokenizer)

    def answers(self, condition: Condition) -> list[str]:
        """One greedy answer a prompt."""
        said: list[str] = []
        for start in range(0, len(self.batch), ROWS_AT_ONCE):
            rows = list(range(start, min(start + ROWS_AT_ONCE, len(self.batch))))
            edit = self._edit(condition, self.mask[rows])
            ids = self.pair.generate(self.batch.rows(rows), self.n, edit, stop_ids=self.stops)
            said += [t.strip() for t in self.pair.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return said

    def readings(self, chosen: Sequence[Condition]) -> Iterator[np.ndarray]:
        """For each condition [prompt, 2]: the mean log-probability of the gold answer's tokens, and KL(unedited ‖ edited) there."""
        found = np.full((len(chosen), len(self.text), 2), np.nan)
        for indices, batch in self.text.batches(4096):
            acts = self.pair.capture(batch)
            mask = kept_tokens(batch, acts, self.drop)
            spoken = torch.zeros_like(batch.assistant)
            spoken[:, :-1] = batch.assistant[:, 1:]  # predicted one token earlier
            gold = batch.ids.roll(-1, 1)[spoken][:, None]
            owner, n = spoken.nonzero()[:, 0], spoken.sum(-1).clamp(min=1)
            clean = self._log_probs(batch, None, spoken)
            for number, condition in enumerate(chosen):
                make = self._edit(condition, mask)
                edit = None if make is None else make(lambda acts=acts: acts[:, :, BASE])
                edited = clean if edit is None else self._log_probs(batch, edit, spoken)
                likely = edited.gather(-1, gold.to(edited.device))[:, 0].double()
                both = torch.stack([likely, kl(clean, edited)], -1).cpu()
                total = torch.zeros(len(batch), 2, dtype=torch.float64).index_add_(0, owner.cpu(), both)
                found[number, indices] = (total / n.cpu()[:, None]).numpy()
        yield from found

    def _edit(self, condition: Condition, mask: torch.Tensor) -> Callable | None:
        if not condition.latents:
            return None
        return lambda other: ablate(condition.crosscoder, condition.latents, other, part=self.part, mask=mask)

    def _log_probs(self, batch: Any, edit: Any, where: torch.Tensor) -> torch.Tensor:
        logits = self.pair.run(batch, edit)
        return log_probs(logits, where.to(logits.device))


def outcomes(
    pair: ModelPair,
    task: Task,
    off_task: Task | None,
    chosen: Sequence[Condition],
    *,
    part: Part,
    drop: Drop,
    max_new_tokens: int,
    progress: bool,
) -> pd.DataFrame:
    """One row a condition and prompt: ``condition`` (its number), ``kind, on_task, prompt, answer``, and on the task ``log_prob,
    kl``."""
    rows = []
    for on_task, asked in ((True, task), (False, off_task)):
        if asked is None or not len(asked.prompts):
            continue
        subject = Subject(pair, asked.prompts, asked.gold, part, drop, max_new_tokens)
        said = [
            subject.answers(c) for c in tracked(chosen, f"answering: {asked.name}", len(chosen), progress)
        ]
        unknown = np.full((len(asked.prompts), 2), np.nan)
        read = list(subject.readings(chosen)) if on_task else [unknown] * len(chosen)
        for number, (condition, texts, values) in enumerate(zip(chosen, said, read, strict=True)):
            for prompt, answer in enumerate(texts):
                about = {"condition": number, "kind": condition.kind, "on_task": on_task}
                about |= {"prompt": asked.prompts[prompt], "answer": answer}
                rows.append(about | dict(zip(("log_prob", "kl"), values[prompt].tolist(), strict=True)))
    return pd.DataFrame(rows)


def marked(rows: pd.DataFrame, task: Task, off_task: Task | None) -> pd.DataFrame:
    """The rows with ``correct``: what the task that each prompt is of says of the answer."""
    number = rows.groupby(["condition", "on_task"]).cumcount()
    places = list(zip(rows["condition"], rows["on_task"], number, rows["answer"], strict=True))
    before = {(on_task, n): answer for condition, on_task, n, answer in places if condition == 0}
    asked = {True: task, False: off_task}
    right = [asked[on_task].correct(n, answer, before[on_task, n]) for _, on_task, n, answer in places]
    return rows.assign(correct=right)


def effects(rows: pd.DataFrame, margin: float, *, n_resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """What the outcomes say, each of the gated set against nothing and against the matched sets.

    ``effect``: mean over matched sets of correct, minus the gated set's, with ``low, high`` (paired bootstrap over prompts).
    ``rank_p``: of the gated set's loss among the matched sets' losses.  ``equivalence_p`` within ``margin``, and
    ``harmless_p`` of the gated set with nothing; ``mde``: the
    smallest effect that so many prompts find four times in five.  McNemar compares with the majority of the matched sets.
    ``off_effect`` with ``off_low`` and ``on_minus_off``: the effect on the other prompts, and how much larger it is on the task.
    """
    task = rows.query("on_task")
    right = {kind: _grid(task, kind, "correct") for kind in (NONE, GATED, MATCHED, TURNED)}
    none, gated, matched = right[NONE][0] > 0, right[GATED][0] > 0, right[MATCHED]
    gap = matched.mean(0) - right[GATED][0]
    low, high = mean_interval(gap, n_resamples=n_resamples, seed=seed)
    lost = none.mean() - matched.mean(1)
    own = float(none.mean() - gated.mean())
    majority = mcnemar(matched.mean(0) > 0.5, gated)
    against_none = mcnemar(none, gated)
    sizes = {name: [_grid(task, kind, name) for kind in (GATED, MATCHED)] for name in ("log_prob", "kl")}
    finer = {name: (g[0] - m.mean(0)) for name, (g, m) in sizes.items()}
    adjusted = holm([majority.p, *(signed_rank_p(values) for values in finer.values())])
    found = {
        "n_prompts": len(gap), "n_matched": len(matched), "n_turned": len(right[TURNED]),
        "accuracy_none": float(none.mean()), "accuracy_gated": float(gated.mean()),
        "accuracy_matched": float(matched.mean()), "accuracy_matched_worst": float(matched.mean(1).min()),
        "accuracy_turned": float(right[TURNED].mean()) if len(right[TURNED]) else np.nan,
        "effect": float(gap.mean()), "low": low, "high": high, "rank_p": p_value(own, lost.tolist()),
        "mcnemar_none": [against_none.b, against_none.c, against_none.p],
        "mcnemar_matched": [majority.b, majority.c, majority.p], "cohens_g": majority.cohens_g,
        "equivalence_p": equivalence_p(gap, margin), "margin": margin,
        "harmless_p": equivalence_p(right[NONE][0] - right[GATED][0], margin),
        "mde": minimum_detectable_effect(discordance_of(majority), len(gap)),
        "holm": dict(zip(("correct", "log_prob", "kl"), adjusted, strict=True)),
        "dz": {name: cohens_dz(values) for name, values in finer.items()},
        "log_prob_gated": float(sizes["log_prob"][0].mean()), "log_prob_matched": float(sizes["log_prob"][1].mean()),
        "kl_gated": float(sizes["kl"][0].mean()), "kl_matched": float(sizes["kl"][1].mean()),
    }  # fmt: skip
    off = rows.query("not on_task")
    if len(off):
        other = _grid(off, MATCHED, "correct").mean(0) - _grid(off, GATED, "correct")[0]
        low, high = gap_interval(gap, other, n_resamples=n_resamples, seed=seed)
        found |= {"n_off": len(other), "off_effect": float(other.mean())}
        found["off_low"] = mean_interval(other, n_resamples=n_resamples, seed=seed)[0]
        found |= {"on_minus_off_low": low, "on_minus_off_high": high}
    return found


def _grid(rows: pd.DataFrame, kind: str, column: str) -> np.ndarray:
    """[condition of this kind, prompt]."""
    here = rows.loc[(rows["kind"] == kind).to_numpy()]
    sets = [group[column].to_numpy(float) for _, group in here.groupby("condition", sort=True)]
    return np.stack(sets) if sets else np.zeros((0, 0))
