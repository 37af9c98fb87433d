"""How much of the behaviour of the tuned model do chosen latents carry?  The paper's causal table.

The residual stream of the *tuned* model is replaced at the hook by the base model's plus what some latents
would change, and the rest of the tuned model runs on it.  The closer its predictions come to those of the
untouched tuned model (KL), the more of the change the latents hold.

Source: Minder et al. 2025, arXiv:2504.02922, causal experiments; the bootstrap over conversations and the
paired difference are ours (the paper treats tokens as independent, which makes intervals too narrow)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.plots import kl_bars
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.conditions import (
    Condition,
    Dictionary,
    Reading,
    fixed_conditions,
    latent_sets,
    of_latents,
)
from tl_crosscoder.studies.intervals import middle, ratio_draws
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.predictions import SCORES, scores
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.weights import weights_sha256

SPLITS = ("delta_norm", "latent scaling")


@dataclass(frozen=True)
class SubstitutionResult(StudyResult):
    """``table``: one row for each condition and set of tokens; ``per_sequence``: the sums that the intervals come from.

    Columns of ``table``: ``condition, tokens`` (all, first 9, rest), ``kl`` (nats per predicted token, to the
    tuned model), ``ci_low, ci_high`` (95 %, bootstrap over conversations), ``recovered`` (share of the KL of
    ``none`` that is gone, with its interval), ``nll`` of the true tokens, ``nll_argmax`` of the tuned model's first
    choice, ``agreement`` (how often that is the first choice here too), ``kl_base`` (to the base model),
    ``n_tokens``, ``n_latents``, and of random sets ``draws_sd``, the standard deviation of the draws' KL.
    ``paired``: difference in KL top − bottom of each split, with its interval; negative: the top half carries more."""

    key: ClassVar = "substitution"
    title: ClassVar = "What the latents carry"
    text: ClassVar = (
        "The tuned model runs on the base model's activations plus the change that chosen latents would make. "
        "The lower the KL to the untouched tuned model, the more of the change these latents hold."
    )
    notes: ClassVar = ("Intervals: 95 %, bootstrap over whole sequences. Random sets: mean of the draws.",)
    index: ClassVar = ("condition", "tokens")
    says_verdict: ClassVar = False

    table: pd.DataFrame
    paired: pd.DataFrame
    per_sequence: pd.DataFrame

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        kl = self.table[self.table["tokens"] == "all"].set_index("condition")
        best = [name for name in kl.index if name.startswith("top ") and name.endswith("ranked")]
        parts = [
            f"putting the base activations into the tuned model costs {kl.loc['none', 'kl']:.3g} nats a token"
        ]
        parts += [
            f"the {name.split()[1]} highest-ranked latents win back {kl.loc[name, 'recovered']:.0%}"
            for name in best
        ]
        parts.append(f"all latents {kl.loc['all', 'recovered']:.0%}")
        return ", ".join(parts) + "."

    def plot(self) -> Drawing:
        """KL under each condition, on each set of tokens."""
        return kl_bars(self.table)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without ``per_sequence``."""
        return {name: part for name, part in super().to_dict().items() if name != "per_sequence"}


def substitution(
    crosscoder: Crosscoder,
    pair: ModelPair,
    corpus: Corpus,
    table: pd.DataFrame,
    *,
    ranking: str = "rank_score",
    top: tuple[int, ...] = (10, 30),
    n_specific: int | None = None,
    n_random: int = 5,
    conditions: Literal["main", "every"] = "main",
    template_tokens: bool = True,
    drop: Drop | None = None,
    seed: int = 0,
    max_tokens: int = 4096,
    n_bootstrap: int = 2000,
    parts: str | Path | None = None,
    progress: bool = False,
) -> SubstitutionResult:
    """KL to the tuned model under each condition, with intervals from a bootstrap clustered by conversation.

    ==================================== ==================================================================================
    condition                            what the tuned model gets at the hook
    ==================================== ==================================================================================
    ``none``                             the base activations: the whole change is missing
    ``base``                             nothing: the base model end to end
    ``all``                              base activations + every latent's change
    ``error``                            tuned activations − every latent's change: only what the crosscoder did not capture
    ``template``                         base activations, tuned ones at the chat template's tokens
    ``top N ranked``                     base activations + the change of the N latents highest in ``ranking``
    ``random N``                         the same for N random live latents outside the top, mean of ``n_random`` draws
    ``delta_norm top/bottom``            halves of the ``n_specific`` latents with the highest ``delta_norm``
    ``latent scaling top/bottom``        halves of the same latents by rank(nu_error) + rank(nu_recon), low first
    *with* ``conditions="every"``
    ``tuned``                            the tuned activations: 0 where hook and code are right
    ``bias``, ``all with bias``          base activations + the difference of the decoder biases (and every latent's change)
    ``..., additive``                    the halves again, adding ``f_j d_j^tuned`` without taking ``f_j d_j^base`` off
    ``random N of the specific/of all``  sets as large as a half, drawn from those ``n_specific`` and from all live latents
    ``delta_norm above 0.7``             base activations + the change of all these latents
    ``nu_act below 0.6/0.3/0.1``         the same for Latent Scaling of the activation
    ==================================== ==================================================================================

    Tokens that ``drop`` (as in :func:`capture`) keeps out of training, such as the first of a sequence and attention
    sinks, keep the tuned activations in every condition but ``base``.  Predictions are counted where the *next* token is
    the assistant's; in text without an assistant, at every captured position.  "First 9" are the first nine predictions
    of each assistant turn, the one made at the template's last token included (the paper leaves that one out).
    ``n_specific`` defaults to a tenth of the live latents; give two dictionaries the same to compare them.  Latents with
    an undefined value of a column are left out of its split, empty sets altogether.

    A dictionary of the difference (one model) has the conditions that its table allows; name a ``ranking`` that it has.
    With ``parts`` each condition of each batch is kept in that folder, and a study that was killed goes on there.
    """
    if not len(corpus):
        raise EmptyData("substitution needs at least one sequence of text.")
    drop, every = drop or Drop(), conditions == "every"
    sets = latent_sets(table, ranking, top, n_specific, n_random, seed, every)
    asked = fixed_conditions(template_tokens, every)
    asked |= {name: of_latents(ids, crosscoder.d_sae) for name, ids in sets.items()}
    if every and crosscoder.n_models > 1:
        halves = [f"{split} {half}" for split in SPLITS for half in ("top", "bottom")]
        asked |= {
            f"{name}, additive": of_latents(sets[name], crosscoder.d_sae, additive=True)
            for name in halves
            if name in sets
        }
    about: dict[str, Any] = {"study": "substitution"}
    if parts is not None:
        about |= {"weights": weights_sha256(crosscoder), "pair": pair.fingerprint, "corpus": corpus.sha256}
        about |= {"drop": asdict(drop), "max_tokens": max_tokens}
        about |= {"conditions": {name: condition.latents for name, condition in asked.items()}}
    per_sequence = _measure(
        Dictionary(crosscoder), pair, corpus, asked, drop, max_tokens, Parts(parts, **about), progress
    )
    merged = _merge_draws(per_sequence)
    return SubstitutionResult(*_summarise(merged, per_sequence, asked, n_bootstrap, seed), merged)


def _measure(
    dictionary: Dictionary,
    pair: ModelPair,
    corpus: Corpus,
    asked: dict[str, Condition],
    drop: Drop,
    max_tokens: int,
    kept: Parts,
    progress: bool,
) -> pd.DataFrame:
    """Sums of every score for each condition, set of tokens and sequence; both models' own runs of a batch are shared."""
    cluster = corpus.conversations().tolist()  # answers to one prompt are resampled together
    batches = list(corpus.batches(max_tokens))
    jobs = tracked(
        [(i, j) for i in range(len(batches)) for j in range(len(asked))], "substituting", None, progress
    )
    names, found, reading, current = list(asked), [], None, -1
    for number, place in jobs:
        indices, batch = batches[number]
        if number != current:
            reading, current = Reading(dictionary, pair, batch, drop), number
        assert reading is not None
        condition = asked[names[place]]
        sums = kept(f"{number}-{place}", lambda r=reading, c=condition: _sums(r, c.run(r)))
        for tokens, columns in sums.items():
            rows = pd.DataFrame(columns)
            rows["sequence"] = [cluster[i] for i in indices.tolist()]
            found.append(rows.assign(condition=names[place], tokens=tokens))
    return pd.concat(found, ignore_index=True)


def _sums(reading: Reading, patched: Tensor) -> dict[str, dict[str, list[Any]]]:
    """For each set of tokens, the sum of every score over each sequence, and ``n`` predictions."""
    every = reading.counted["all"]
    true = reading.batch.ids.roll(-1, 1)[every]
    sums = {}
    of = scores(reading.tuned, reading.base, patched, true)
    for tokens, where in reading.counted.items():
        columns = {"n": where.sum(-1).tolist()}
        for name, values in of.items():
            spread = torch.zeros(every.shape, dtype=torch.float64, device=every.device)
            spread[every] = values
            columns[f"{name}_sum"] = (spread * where).sum(-1).tolist()
        sums[tokens] = columns
    return sums


def _merge_draws(drawn: Any) -> Any:
    """One row for each condition, set of tokens and conversation; of ``random N#draw`` the mean of the draws."""
    keys, values = ["condition", "tokens", "sequence"], ["n", *(f"{name}_sum" for name in SCORES)]
    parts = drawn["condition"].str.partition("#")
    drawn = drawn.assign(condition=parts[0], draw=parts[2])
    each = drawn.groupby([*keys, "draw"], sort=False)[values].sum()
    return each.groupby(keys, sort=False).mean().reset_index()


def _summarise(
    merged: Any, drawn: Any, asked: dict[str, Condition], n_bootstrap: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table, and the paired differences; all intervals of one set of tokens come from the same draws."""
    sizes = {n.split("#")[0]: len(c.latents) for n, c in asked.items() if c.latents is not None}
    names = list(dict.fromkeys(name.split("#")[0] for name in asked))
    spread = _spread_of_draws(drawn)
    table, paired = {}, []
    for tokens, group in merged.groupby("tokens", sort=False):
        wide: Any = group.pivot(index="sequence", columns="condition")
        counts = wide["n"]["none"].to_numpy(float)
        total = counts.sum()
        values = {
            name: wide[f"{name}_sum"][names].to_numpy(float).sum(0) / total
            if total
            else np.full(len(names), np.nan)
            for name in SCORES
        }
        draws = ratio_draws(wide["kl_sum"][names].to_numpy(float), counts, n_bootstrap, seed)
        low, high = middle(draws)
        none, of_none = values["kl"][names.index("none")], draws[:, [names.index("none")]]
        gone = none > 0
        shares = 1 - draws / np.where(of_none > 0, of_none, np.nan)
        least, most = middle(shares) if gone else np.full((2, len(names)), np.nan)
        for i, name in enumerate(names):
            row = {
                "condition": name,
                "tokens": tokens,
                "kl": values["kl"][i],
                "ci_low": low[i],
                "ci_high": high[i],
            }
            row |= {"recovered": 1 - values["kl"][i] / none if gone else np.nan}
            row |= {"recovered_low": least[i], "recovered_high": most[i]}
            row |= {score: values[score][i] for score in ("nll", "nll_argmax", "agreement", "kl_base")}
            row |= {"n_tokens": int(total), "n_latents": sizes.get(name, np.nan)}
            table[name, tokens] = row | {"draws_sd": spread.get((name, tokens), np.nan)}
        for split in [f"{split}{kind}" for kind in ("", ", additive") for split in SPLITS]:
            ends = [
                split.replace(",", f" {half},") if "," in split else f"{split} {half}"
                for half in ("top", "bottom")
            ]
            if set(ends) <= set(names):
                a, b = (names.index(end) for end in ends)
                gap_low, gap_high = middle(draws[:, a] - draws[:, b])
                gap = {"kl_top_minus_bottom": values["kl"][a] - values["kl"][b]}
                paired.append(
                    {
                        "split": split,
                        "tokens": tokens,
                        **gap,
                        "ci_low": float(gap_low),
                        "ci_high": float(gap_high),
                    }
                )
    order = [(name, tokens) for name in names for tokens in merged["tokens"].unique()]
    return pd.DataFrame([table[key] for key in order]), pd.DataFrame(paired)


def _spread_of_draws(drawn: Any) -> dict[tuple[str, str], float]:
    """The standard deviation of the draws' KL, for conditions that are drawn more than once."""
    sums = drawn[drawn["condition"].str.contains("#")].groupby(["condition", "tokens"])[["kl_sum", "n"]].sum()
    values: dict[tuple[str, str], list[float]] = {}
    for (condition, tokens), row in sums.iterrows():
        if row["n"] > 0:
            values.setdefault((condition.split("#")[0], tokens), []).append(row["kl_sum"] / row["n"])
    return {key: float(np.std(v, ddof=1)) for key, v in values.items() if len(v) > 1}
