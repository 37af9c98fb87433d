"""Which latents fire on a behaviour, and does the tuned model still show it without them?

Two ways to take latents out of the tuned model while it answers, with the base model running in lockstep:

- **undo**: only the difference, ``h_tuned − Σ f_j (d_j^tuned − d_j^base)``.  Shared latents are untouched by construction.
- **remove**: the whole latent, ``h_tuned − Σ f_j d_j^tuned``.  The fair comparison with controls.

Controls for the largest set: ``n_draws`` magnitude-matched random sets (mean and worst are reported: single
random sets sometimes kill a behaviour), and the shared latents that write most on the same answers.  Rates come
with the answers themselves: a keyword alone proves little."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from scipy import stats

from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.interventions import Part, ablate, substitute
from tl_crosscoder.models.answers import own_answers, turn_ends
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.pair import ModelPair, Side
from tl_crosscoder.studies.controls import matched_random, same_firing
from tl_crosscoder.types import BASE, TUNED

ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class BehaviourResult:
    """``table``: behaviour, condition, ``rate`` with its 95 % Wilson interval ``low, high`` (one prompt, one trial),
    and for drawn controls the mean rate and the ``worst`` (lowest) draw.

    ``firing``: for the highest-ranked latents, how often they fire on the behaviour's answers and elsewhere.
    ``answers``: behaviour, condition, prompt, answer, shown (of drawn controls, the first draw's).
    """

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
        mine = self.table[self.table["behaviour"] == name].set_index("condition")
        undo = [c for c in mine.index if c.startswith("undo top")]
        tuned, base = mine.loc["tuned", "rate"], mine.loc["base", "rate"]
        text = f"{name}: shown on {tuned:.0%} of held-out prompts by the tuned model, {base:.0%} by the base"
        if undo:
            text += "; undoing the difference of the " + ", ".join(
                f"top {c.split()[-1]} leaves {mine.loc[c, 'rate']:.0%}" for c in undo
            )
        random = "remove matched random"
        if random in mine.index:
            top = [c for c in mine.index if c.startswith("remove top")][-1]
            text += (
                f"; removing the whole {top.removeprefix('remove ')} leaves {mine.loc[top, 'rate']:.0%}, matched random latents "
                f"{mine.loc[random, 'rate']:.0%} (worst of {mine.loc[random, 'n_draws']} draws {mine.loc[random, 'worst']:.0%})"
            )
        fires = self.firing.loc[self.firing["behaviour"] == name, "fires_on_it"].to_numpy()
        return f"{text}; {fires.sum()} of the top {len(fires)} latents fire on it."

    def to_json(self) -> str:
        return json.dumps({"table": self.table.to_dict("records"), "firing": self.firing.to_dict("records")})


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
    max_new_tokens: int = 16,
    seed: int = 0,
) -> BehaviourResult:
    """The rate of each behaviour with the highest-ranked latents taken out, beside its controls.  Greedy answers.

    ``install`` also adds the latents' difference to the *base* model.  A latent "fires on" a behaviour when it
    is active on at least 5 % of the answers' tokens and ten times as often there as in ``table``'s tokens."""
    if not behaviours or not all(b.heldout for b in behaviours):
        raise EmptyData("behaviour_removal needs at least one behaviour, each with at least one prompt.")
    crosscoder.eval()
    order = ranked(table, ranking)
    sizes = [n for n in top if n <= len(order)]
    most = order[: max(sizes)]
    draws = matched_random(table, most, n_draws=n_draws, seed=seed) if n_draws else []
    rows, firing, answers = [], [], []
    for behaviour in behaviours:
        prompts = Corpus.prompts(list(behaviour.heldout), pair.tokenizer)
        say = _Speaker(crosscoder, pair, prompts, max_new_tokens)
        plain = own_answers(pair, prompts, max_new_tokens=max_new_tokens)
        on_answers = _firing_on(crosscoder, pair, plain.select(range(len(prompts), len(plain))))
        firing.append(_firing_table(behaviour.name, on_answers, table, order[: min(10, len(order))]))
        control = same_firing(table, on_answers["mass"].to_numpy(), len(most), exclude=most)
        sets = {f"top {n}": [order[:n]] for n in sizes} | {"same firing": [control], "matched random": draws}
        said = _assistant_text(plain, pair.tokenizer)
        spoken = {"base": [said[: len(prompts)]], "tuned": [said[len(prompts) :]]}
        parts: dict[str, Part] = {"undo": "difference", "remove": "whole"}
        for verb, part in parts.items():
            spoken |= {f"{verb} {name}": texts for name, texts in say.without(sets, part).items()}
        if install:
            spoken |= say.installed(
                {f"install top {len(most)}": most, "install all": list(range(crosscoder.d_sae))}
            )
        for condition, drawn in spoken.items():
            rows.append({"behaviour": behaviour.name, "condition": condition, **_rates(behaviour, drawn)})
            answers += [
                {
                    "behaviour": behaviour.name,
                    "condition": condition,
                    "prompt": p,
                    "answer": a,
                    "shown": behaviour.shown_in(a),
                }
                for p, a in zip(behaviour.heldout, drawn[0] if drawn else [], strict=False)
            ]
    return BehaviourResult(pd.DataFrame(rows), pd.concat(firing, ignore_index=True), pd.DataFrame(answers))


class _Speaker:
    """Greedy answers of a pair to a few prompts, under many sets of latents at once (one set a row of the batch)."""

    def __init__(self, crosscoder: Crosscoder, pair: ModelPair, prompts: Corpus, max_new_tokens: int):
        self.crosscoder, self.pair, self.prompts, self.n = crosscoder, pair, prompts, max_new_tokens
        self.stops = turn_ends(pair)

    def without(self, sets: dict[str, list[list[int]]], part: Part) -> dict[str, list[list[str]]]:
        """For each named list of sets: the answers under each set, ``part`` of whose latents is taken out of the tuned model."""

        def make(latents, mask):
            return lambda other: ablate(self.crosscoder, latents, other, part=part, mask=mask)

        named = [(name, ids) for name, group in sets.items() for ids in group]
        spoken = iter(self._under([ids for _, ids in named], make, "tuned"))
        out: dict[str, list[list[str]]] = {name: [] for name, group in sets.items() if group}
        for name, _ in named:
            out[name].append(next(spoken))
        return out

    def installed(self, sets: dict[str, list[int]]) -> dict[str, list[list[str]]]:
        """The same with the latents' difference added to the base model."""

        def make(latents, mask):
            return lambda other: substitute(self.crosscoder, latents, other, model=BASE, mask=mask)

        return {
            name: [texts]
            for name, texts in zip(sets, self._under(list(sets.values()), make, "base"), strict=True)
        }

    def _under(self, sets: list[list[int]], make, side: Side) -> list[list[str]]:
        jobs = [(i, ids) for ids in sets for i in range(len(self.prompts))]
        texts: list[str] = []
        for start in range(0, len(jobs), ROWS_AT_ONCE):
            part = jobs[start : start + ROWS_AT_ONCE]
            batch = self._batch([i for i, _ in part])
            latents = torch.zeros(len(part), self.crosscoder.d_sae, dtype=torch.bool)
            for row, (_, ids) in enumerate(part):
                latents[row, ids] = True
            mask = batch.attention_mask & ~batch.first
            texts += self._text(
                self.pair.generate(batch, self.n, make(latents, mask), side=side, stop_ids=self.stops)
            )
        size = len(self.prompts)
        return [texts[i : i + size] for i in range(0, len(texts), size)]

    def _batch(self, indices):
        return self.prompts.batch(list(indices), pad="left")

    def _text(self, ids: torch.Tensor) -> list[str]:
        return [t.strip() for t in self.pair.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def tuned_answers(pair: ModelPair, behaviour: Behaviour, max_new_tokens: int) -> Corpus:
    """The tuned model's own answers to the held-out prompts of a behaviour."""
    answers = own_answers(pair, list(behaviour.heldout), max_new_tokens=max_new_tokens)
    return answers.select(range(len(behaviour.heldout), len(answers)))


def _assistant_text(answers: Corpus, tokenizer) -> list[str]:
    said = [answers.ids_of(i)[answers.flags_of(i)["assistant"]] for i in range(len(answers))]
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


def _firing_on(crosscoder: Crosscoder, pair: ModelPair, answers: Corpus) -> pd.DataFrame:
    """For each latent, over the answers' own tokens: the share it fires on, the mean norm it writes into the tuned model."""
    count = torch.zeros(crosscoder.d_sae, dtype=torch.float64)
    total, tokens = torch.zeros_like(count), 0
    for _, batch in answers.batches(8192):
        with torch.no_grad():
            codes = crosscoder.encode_sparse(pair.capture(batch)[batch.assistant].float())
        tokens += len(codes)
        count.index_add_(0, codes.latents.cpu(), torch.ones(len(codes.latents), dtype=torch.float64))
        total.index_add_(0, codes.latents.cpu(), codes.values.double().cpu())
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
            "fires_on_it": ((here >= 0.05) & (here >= 10 * elsewhere)).to_numpy(),
        }
    )


def _rates(behaviour: Behaviour, drawn: list[list[str]]) -> dict[str, float]:
    rates = [sum(map(behaviour.shown_in, texts)) / len(texts) for texts in drawn]
    n = sum(map(len, drawn))
    shown = sum(behaviour.shown_in(text) for texts in drawn for text in texts)
    interval = stats.binomtest(shown, n).proportion_ci(method="wilson")
    return {
        "rate": shown / n,
        "low": interval.low,
        "high": interval.high,
        "worst": min(rates),
        "n_draws": len(drawn),
        "n": n,
    }
