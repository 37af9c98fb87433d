"""Which latents fire on a behaviour, and does the tuned model still show it without them?

Two ways to take latents out of the tuned model while it answers, with the base model running in lockstep:

- **undo**: only the difference, ``h_tuned − Σ f_j (d_j^tuned − d_j^base)``.  Shared latents are untouched by construction.
- **remove**: the whole latent, ``h_tuned − Σ f_j d_j^tuned``.  The fair comparison with controls.

Controls for the largest set: ``n_draws`` magnitude-matched random sets (mean and worst are reported: single
random sets sometimes kill a behaviour), and the shared latents that write most on the same answers.  Rates come
with the answers themselves: a keyword alone proves little."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from scipy import stats

from tl_crosscoder.analysis.base import evaluating
from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.plots import behaviour_bars
from tl_crosscoder.interventions import Part, ablate, substitute
from tl_crosscoder.models.answers import own_answers, turn_ends
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair, Side
from tl_crosscoder.studies.controls import matched_random, same_firing
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.where import kept_tokens
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import refuse_unlike

ROWS_AT_ONCE = 128
PARTS: dict[str, Part] = {"undo": "difference", "remove": "whole"}


@dataclass(frozen=True)
class BehaviourResult(StudyResult):
    """``table``: behaviour, condition, ``rate`` with ``low, high`` (95 % Wilson, one prompt one trial; of drawn controls the
    middle 95 % of the draws), the ``worst`` (lowest) draw, ``n_draws`` and ``n_latents`` of a set.

    ``firing``: for the highest-ranked latents, how often they fire on the behaviour's answers and elsewhere.
    ``answers``: behaviour, condition, prompt, answer, shown (of drawn controls, the first draw's).
    """

    key: ClassVar = "behaviour"
    title: ClassVar = "Does the behaviour survive without the latents?"
    text: ClassVar = (
        "Undo takes out only the difference a latent makes between the models, remove the whole latent; install adds "
        "the difference to the base model. Matched random sets are as large and as loud."
    )
    notes: ClassVar = (
        "Intervals: 95 % Wilson over prompts; of drawn sets, the middle 95 % of the draws. Worst: the lowest of the draws.",
    )
    index: ClassVar = ("behaviour", "condition")
    says_verdict: ClassVar = False

    table: pd.DataFrame
    firing: pd.DataFrame
    answers: pd.DataFrame

    def rate(self, behaviour: str, condition: str) -> float:
        """The rate of one condition."""
        rows = self.table.query("behaviour == @behaviour and condition == @condition")
        if rows.empty:
            raise KeyError(
                f"no {condition!r} for {behaviour!r}; conditions: {sorted(set(self.table['condition']))}"
            )
        return float(rows["rate"].item())

    @property
    def verdict(self) -> list[str]:
        """A sentence for each behaviour, with the figures, whatever they show."""
        return [self._sentence(name) for name in self.table["behaviour"].unique()]

    def _sentence(self, name: str) -> str:
        rows = self.table[self.table["behaviour"] == name].set_index("condition")
        mine = rows["rate"].to_dict()
        text = f"{name}: shown on {mine['tuned']:.0%} of held-out prompts by the tuned model, {mine['base']:.0%} by the base"
        undo = [c for c in mine if c.startswith("undo top")]
        if undo:
            left = ", ".join(f"top {c.split()[-1]} leaves {mine[c]:.0%}" for c in undo)
            size = undo[-1].split()[-1]
            whole = mine[f"remove top {size}"]
            text += (
                f"; undoing the difference of the {left}; removing the whole top {size} leaves {whole:.0%}"
            )
        for control in ("matched random", "same firing"):
            if f"undo {control}" in mine:
                row = rows.loc[f"remove {control}"]
                drawn = f", worst of {row['n_draws']} draws {row['worst']:.0%}" if row["n_draws"] > 1 else ""
                text += f"; {control}: undone {mine[f'undo {control}']:.0%}, removed {row['rate']:.0%}{drawn}"
        firing = self.firing[self.firing["behaviour"] == name]
        fires, n = firing.loc[firing["fires_on_it"], "latent"].tolist(), len(firing)
        which = f" ({', '.join(map(str, fires))})" if fires else ""
        return f"{text}; {len(fires)} of the top {n} latents fire on it{which}.{self._sample(name, undo)}"

    def _sample(self, name: str, undo: list[str]) -> str:
        """One prompt with the tuned model's answer and the answer with the largest set undone."""
        if not undo:
            return ""
        mine = [row for row in records(self.answers) if row["behaviour"] == name]
        first = {row["condition"]: row for row in reversed(mine)}  # the first prompt's row of each condition
        before, after = first["tuned"], first[undo[-1]]
        return f" Asked “{before['prompt']}” it says “{before['answer']}”, then “{after['answer']}”."

    def plot(self) -> Drawing:
        """Rates under each condition, beside the controls."""
        return behaviour_bars(self.table)


def behaviour_removal(
    crosscoder: Crosscoder,
    pair: ModelPair,
    behaviours: Sequence[Behaviour],
    table: pd.DataFrame,
    *,
    ranking: str = "rank_score",
    top: Sequence[int] = (3, 10, 30),
    n_draws: int = 40,
    install: bool = True,
    drop: Drop | None = None,
    max_new_tokens: int = 16,
    seed: int = 0,
) -> BehaviourResult:
    """The rate of each behaviour with the highest-ranked latents taken out, beside its controls.  Greedy answers.

    ``install`` also adds the latents' difference to the *base* model.  ``drop``, as in :func:`capture`: the prompts' tokens it
    keeps out of training are not edited.  A latent "fires on" a behaviour when it is active on at least 5 % of the answers'
    tokens and ten times as often there as in ``table``'s tokens.  Sets larger than the number of live latents are left
    out, and controls where too few live latents are left for one.
    """
    if not behaviours or not all(b.heldout for b in behaviours):
        raise EmptyData("behaviour_removal needs at least one behaviour, each with at least one prompt.")
    refuse_unlike(crosscoder, "behaviour_removal")
    order = ranked(table, ranking)
    sizes = [n for n in top if n <= len(order)]
    most = order[: max(sizes, default=0)]
    enough = len(order) >= 2 * len(most) > 0  # a control of the same size must exist
    draws = matched_random(table, most, n_draws=n_draws, seed=seed) if enough and n_draws else []
    rows, firing, answers = [], [], []
    for behaviour in behaviours:
        prompts = Corpus.prompts(list(behaviour.heldout), pair.tokenizer)
        plain = own_answers(pair, prompts, max_new_tokens=max_new_tokens)
        on_answers = firing_on(crosscoder, pair, plain.select(range(len(prompts), len(plain))))
        firing.append(_firing_table(behaviour.name, on_answers, table, order[:10]))
        sets = {f"top {n}": [order[:n]] for n in sizes} | ({"matched random": draws} if draws else {})
        alike = same_firing(table, on_answers["mass"].to_numpy(), len(most), exclude=most)
        sets |= {"same firing": [alike]} if alike else {}
        said = _assistant_text(plain, pair.tokenizer)
        spoken = {"base": _Said([said[: len(prompts)]]), "tuned": _Said([said[len(prompts) :]])}
        say = _Speaker(crosscoder, pair, prompts, max_new_tokens, drop or Drop())
        for verb, part in PARTS.items():
            spoken |= {f"{verb} {name}": texts for name, texts in say.without(sets, part).items()}
        if install and most:
            everything = list(range(crosscoder.d_sae))
            spoken |= say.installed({f"install top {len(most)}": [most], "install all": [everything]})
        for condition, drawn in spoken.items():
            about = {"behaviour": behaviour.name, "condition": condition}
            rows.append(about | _rates(behaviour, drawn))
            for prompt, answer in zip(behaviour.heldout, drawn.texts[0], strict=True):
                answers.append(
                    about | {"prompt": prompt, "answer": answer, "shown": behaviour.shown_in(answer)}
                )
    return BehaviourResult(pd.DataFrame(rows), pd.concat(firing, ignore_index=True), pd.DataFrame(answers))


@dataclass(frozen=True)
class _Said:
    """The answers to all prompts, once for each set of latents; ``n_latents`` in a set."""

    texts: list[list[str]]
    n_latents: int | None = None


class _Speaker:
    """Greedy answers of a pair to a few prompts, under many sets of latents at once (one set a row of the batch)."""

    def __init__(
        self, crosscoder: Crosscoder, pair: ModelPair, prompts: Corpus, max_new_tokens: int, drop: Drop
    ):
        self.crosscoder, self.pair, self.n = crosscoder, pair, max_new_tokens
        self.batch = prompts.batch(range(len(prompts)), pad="left")
        self.mask = kept_tokens(self.batch, pair.capture(self.batch), drop)
        self.stops = turn_ends(pair)

    def without(self, sets: dict[str, list[list[int]]], part: Part) -> dict[str, _Said]:
        """The answers under each of the named sets, ``part`` of whose latents is taken out of the tuned model."""

        def make(latents, mask):
            return lambda other: ablate(self.crosscoder, latents, other, part=part, mask=mask)

        return self._under(sets, make, "tuned")

    def installed(self, sets: dict[str, list[list[int]]]) -> dict[str, _Said]:
        """The same with the latents' difference added to the base model."""

        def make(latents, mask):
            return lambda other: substitute(self.crosscoder, latents, other, model=BASE, mask=mask)

        return self._under(sets, make, "base")

    def _under(self, sets: dict[str, list[list[int]]], make: Callable, side: Side) -> dict[str, _Said]:
        size = len(self.batch)
        jobs = [(row, ids) for group in sets.values() for ids in group for row in range(size)]
        texts: list[str] = []
        for start in range(0, len(jobs), ROWS_AT_ONCE):
            part = jobs[start : start + ROWS_AT_ONCE]
            rows = [row for row, _ in part]
            latents = torch.zeros(len(part), self.crosscoder.d_sae, dtype=torch.bool)
            for i, (_, ids) in enumerate(part):
                latents[i, ids] = True
            edit = make(latents, self.mask[rows])
            ids = self.pair.generate(self.batch.rows(rows), self.n, edit, side=side, stop_ids=self.stops)
            texts += [t.strip() for t in self.pair.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        answers = iter(texts[i : i + size] for i in range(0, len(texts), size))
        return {name: _Said([next(answers) for _ in group], len(group[0])) for name, group in sets.items()}


def tuned_answers(pair: ModelPair, behaviour: Behaviour, max_new_tokens: int) -> Corpus:
    """The tuned model's own answers to the held-out prompts of a behaviour."""
    answers = own_answers(pair, list(behaviour.heldout), max_new_tokens=max_new_tokens)
    return answers.select(range(len(behaviour.heldout), len(answers)))


def _assistant_text(answers: Corpus, tokenizer) -> list[str]:
    said = [answers.ids_of(i)[answers.flags_of(i)["assistant"]] for i in range(len(answers))]
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


def firing_on(crosscoder: Crosscoder, pair: ModelPair, answers: Corpus) -> pd.DataFrame:
    """For each latent, over the answers' own tokens: the share it fires on, the mean norm it writes into the tuned model."""
    count = torch.zeros(crosscoder.d_sae, dtype=torch.float64)
    total, tokens = torch.zeros_like(count), 0
    for _, batch in answers.batches(8192):
        acts = pair.capture(batch).to(crosscoder.W_dec.device)
        with evaluating(crosscoder):
            codes = crosscoder.encode_sparse(acts[batch.assistant.to(acts.device)].float())
        tokens += len(codes)
        count.index_add_(0, codes.latents.cpu(), torch.ones(len(codes.latents), dtype=torch.float64))
        total.index_add_(0, codes.latents.cpu(), codes.of_model(TUNED).values.double().cpu())
    norms = crosscoder.raw_rows().detach()[:, TUNED].norm(dim=-1).double().cpu()
    return pd.DataFrame({"frequency": (count / tokens).numpy(), "mass": (total / tokens * norms).numpy()})


def _firing_table(
    name: str, on_answers: pd.DataFrame, table: pd.DataFrame, latents: list[int]
) -> pd.DataFrame:
    here, elsewhere = on_answers["frequency"].loc[latents], table["frequency"].loc[latents]
    return pd.DataFrame(
        {
            "behaviour": name,
            "latent": latents,
            "frequency_on_answers": here.to_numpy(),
            "frequency_elsewhere": elsewhere.to_numpy(),
            "fires_on_it": fires_on_it(here, elsewhere).to_numpy(),
        }
    )


def fires_on_it(here: pd.Series, elsewhere: pd.Series) -> pd.Series:
    """True for latents active on at least 5 % of a behaviour's own tokens and ten times as often there as elsewhere."""
    return (here >= 0.05) & (here >= 10 * elsewhere)


def _rates(behaviour: Behaviour, drawn: _Said) -> dict[str, float | None]:
    """The rate with its interval: Wilson over prompts, or where sets were drawn the middle 95 % of the draws."""
    rates = [sum(map(behaviour.shown_in, texts)) / len(texts) for texts in drawn.texts]
    if len(rates) == 1:
        n = len(drawn.texts[0])
        interval = stats.binomtest(round(rates[0] * n), n).proportion_ci(method="wilson")
        low, high = interval.low, interval.high
    else:
        low, high = np.quantile(rates, [0.025, 0.975]).tolist()
    mean = sum(rates) / len(rates)
    about = {"worst": min(rates), "n_draws": len(rates), "n_latents": drawn.n_latents}
    return {"rate": mean, "low": low, "high": high, **about}
