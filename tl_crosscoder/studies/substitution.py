"""How much of the behaviour of the tuned model do chosen latents carry?  The paper's causal table.

The residual stream of the *tuned* model is replaced at the hook by the base model's plus what some latents
would change, and the rest of the tuned model runs on it.  The closer its predictions come to those of the
untouched tuned model (KL), the more of the change the latents hold.

Source: Minder et al. 2025, arXiv:2504.02922, causal experiments; the bootstrap over conversations and the
paired difference are ours (the paper treats tokens as independent, which makes intervals too narrow)."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData, ShapeMismatch
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.plots import kl_bars
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.studies.comparators import Comparator
from tl_crosscoder.studies.conditions import (
    Condition,
    Reading,
    fixed_conditions,
    latent_sets,
    of_latents,
    whole,
)
from tl_crosscoder.studies.dictionaries import Dictionary, n_active
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.substitution_table import merge_draws, summarise, sums
from tl_crosscoder.studies.weights import weights_sha256

OWN = "the crosscoder"  # where the dictionaries of a comparison are named


@dataclass(frozen=True)
class SubstitutionResult(StudyResult):
    """``table``: one row for each condition and set of tokens; ``per_sequence``: the sums that the intervals come from.

    Columns of ``table``: ``condition, tokens`` (all, first 9, rest), ``kl`` (nats per predicted token, to the
    tuned model), ``ci_low, ci_high`` (95 %, bootstrap over conversations), ``recovered`` (share of the KL of
    ``none`` that is gone, with its interval), ``nll`` of the true tokens, ``nll_argmax`` of the tuned model's first
    choice, ``agreement`` (how often that is the first choice here too), ``kl_base`` (to the base model),
    ``n_tokens``, ``n_latents``, and of random sets ``draws_sd``, the standard deviation of the draws' KL.
    ``paired``: difference in KL top − bottom of each split, with its interval; negative: the top half carries more.
    ``dictionaries``: where others were compared, of each ``l0``, active latents a token as used, and ``l0_own``, before it was
    brought down to the study's own."""

    key: ClassVar = "substitution"
    title: ClassVar = "What the latents carry"
    text: ClassVar = (
        "The tuned model runs on the base model's activations plus the change that chosen latents would make. "
        "The lower the KL to the untouched tuned model, the more of the change these latents hold."
    )
    notes: ClassVar = (
        "Intervals: 95 %, bootstrap over whole conversations. Random sets: mean of the draws.",
    )
    index: ClassVar = ("condition", "tokens")
    says_verdict: ClassVar = False

    table: pd.DataFrame
    paired: pd.DataFrame
    per_sequence: pd.DataFrame
    dictionaries: pd.DataFrame

    @property
    def verdict(self) -> str:
        """One sentence with the figures, and the intervals (95 %) of what is won back."""
        kl = self.table[self.table["tokens"] == "all"].set_index("condition")
        if not kl.loc["none", "n_tokens"]:
            return "no prediction could be counted: the text is too short, or all of it is left out of the capture."
        if not kl.loc["none", "kl"] > 0:
            return "the tuned model predicts the same on the base activations: there is nothing to win back."
        best = [name for name in kl.index if name.startswith("top ") and name.endswith("ranked")]
        cost = (
            f"putting the base activations into the tuned model costs {kl.loc['none', 'kl']:.3g} nats a token"
        )
        won = [f"the {name.split()[1]} highest-ranked {_share(kl.loc[name])}" for name in best]
        won.append(f"all {_share(kl.loc['all'])}")
        text = f"{cost}; of this, latents win back: {', '.join(won)}."
        return text + "".join(self._compared(kl, row) for row in records(self.dictionaries)[1:])

    def _compared(self, kl: pd.DataFrame, row: dict[str, Any]) -> str:
        """What another dictionary wins back, and with how many active latents."""
        name = row["dictionary"]
        best = [c for c in kl.index if c.startswith(f"{name}: top ") and c.endswith("ranked")]
        parts = [f"its {c.split()[-2]} highest-ranked latents {_share(kl.loc[c])}" for c in best]
        parts.append(f"all {_share(kl.loc[f'{name}: all'])}")
        own = self.dictionaries["l0"].iloc[0]
        return f" {name}, {row['l0']:.3g} latents a token against {own:.3g}: {', '.join(parts)}."

    def plot(self) -> Drawing:
        """KL under each condition, on each set of tokens."""
        return kl_bars(self.table)

    def brief(self) -> pd.DataFrame:
        """All tokens together, without the rarer scores."""
        rows: Any = self.table[self.table["tokens"] == "all"]
        return rows[["condition", "kl", "ci_low", "ci_high", "recovered", "agreement", "nll", "n_latents"]]

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
    against: Mapping[str, Comparator] | None = None,
    template_tokens: bool = True,
    published: bool = False,
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
    *with* ``against={"NAME": ...}``
    ``NAME: all``, ``error``, ``top N``  the same with the change that another dictionary reads, at equal L0
    ==================================== ==================================================================================

    Tokens that ``drop`` (as in :func:`capture`) keeps out of training, such as the first of a sequence and attention
    sinks, keep the tuned activations in every condition but ``base``.  Predictions are counted where the *next* token is
    the assistant's; in text without an assistant, at every captured position.  "First 9" are the first nine predictions
    of each assistant turn, the one made at the template's last token included; ``published`` leaves that one out, as the paper
    does (its nine are then the second to the tenth).
    ``n_specific`` defaults to a tenth of the live latents; give two dictionaries the same to compare them.  Latents with
    an undefined value of a column are left out of its split, empty sets altogether.

    ``against``: other dictionaries of the place, each asked for its own highest latents.  L0 is made equal from above: of a batch's
    activations another dictionary keeps the largest, by what they write, as many as the crosscoder has.  One that is sparser
    stays so; ``dictionaries`` has the figures.

    A dictionary of the difference (one model) has the conditions that its table allows; name a ``ranking`` that it has.
    With ``parts`` each condition of each batch is kept in that folder, and a study that was killed goes on there.
    """
    if not len(corpus):
        raise EmptyData("substitution needs at least one sequence of text.")
    drop, every, against = drop or Drop(), conditions == "every", dict(against or {})
    own, others = Dictionary(crosscoder), _others(against, crosscoder)
    draws = {"top": top, "n_specific": n_specific, "n_random": n_random, "seed": seed}
    asked = fixed_conditions(template_tokens, every)
    asked |= _about_latents(table, ranking, crosscoder, None, every, draws)
    for name, other in against.items():
        theirs = _about_latents(other.table, other.ranking, other.crosscoder, others[name], False, draws)
        asked |= {f"{name}: {kind}": c for kind, c in (whole(others[name]) | theirs).items()}
    about = {} if parts is None else _parts_of(crosscoder, pair, corpus, against)
    about |= {"study": "substitution", "drop": asdict(drop), "max_tokens": max_tokens}
    # in their order: a part is known by its condition's place
    about |= {"conditions": [[name, condition.latents] for name, condition in asked.items()]}
    about |= {"published": True} if published else {}
    batches = list(corpus.batches(max_tokens))
    reading = lambda batch: Reading(own, pair, batch, drop, published)
    per_sequence, dictionaries = _measure(
        reading, others, corpus, batches, asked, Parts(parts, **about), progress
    )
    merged = merge_draws(per_sequence)
    return SubstitutionResult(
        *summarise(merged, per_sequence, asked, n_bootstrap, seed), merged, dictionaries
    )


def _share(row: pd.Series) -> str:
    """What is won back, and its interval."""
    return f"{row['recovered']:.0%} ({row['recovered_low']:.0%} to {row['recovered_high']:.0%})"


def _parts_of(
    crosscoder: Crosscoder, pair: ModelPair, corpus: Corpus, against: Mapping[str, Comparator]
) -> dict[str, Any]:
    """What a finished part was made with: weights, models, text and the dictionaries that are compared."""
    about = {"weights": weights_sha256(crosscoder), "pair": pair.fingerprint, "corpus": corpus.sha256}
    others = [[n, c.reads, weights_sha256(c.crosscoder)] for n, c in against.items()]
    return about | ({"against": others} if others else {})


def _others(against: Mapping[str, Comparator], crosscoder: Crosscoder) -> dict[str, Dictionary]:
    for name, other in against.items():
        if other.crosscoder.d_in != crosscoder.d_in:
            raise ShapeMismatch(
                f"{name!r} is a dictionary of d_in={other.crosscoder.d_in}, the crosscoder's is {crosscoder.d_in}; both have to "
                "read the models at one hook."
            )
    return {name: Dictionary(other.crosscoder, other.reads) for name, other in against.items()}


def _about_latents(
    table: pd.DataFrame,
    ranking: str,
    crosscoder: Crosscoder,
    of: Dictionary | None,
    every: bool,
    draws: dict[str, Any],
) -> dict[str, Condition]:
    """The conditions that are about sets of latents, which the table chooses."""
    sets, d_sae = latent_sets(table, ranking, every=every, **draws), crosscoder.d_sae
    asked = {name: of_latents(ids, d_sae, of) for name, ids in sets.items()}
    if every and crosscoder.n_models > 1:
        halves = [name for name in sets if name.endswith((" top", " bottom"))]
        asked |= {f"{name}, additive": of_latents(sets[name], d_sae, of, additive=True) for name in halves}
    return asked


def _measure(
    reading: Callable[[TokenBatch], Reading],
    others: Mapping[str, Dictionary],
    corpus: Corpus,
    batches: list[tuple[Tensor, TokenBatch]],
    asked: dict[str, Condition],
    kept: Parts,
    progress: bool,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sums of every score for each condition, set of tokens and sequence, and L0; both models' own runs of a batch are shared."""
    cluster = corpus.conversations().tolist()  # answers to one prompt are resampled together
    jobs = [(i, j) for i in range(len(batches)) for j in range(len(asked))]
    names, found, active, current, here = list(asked), [], [], -1, None
    for number, place in tracked(jobs, "substituting", None, progress):
        indices, batch = batches[number]
        if number != current:
            here, current = reading(batch), number
            if others:
                active += kept(f"{number}-active", lambda r=here: _active(r, others))
        assert here is not None
        condition = asked[names[place]]
        totals = kept(f"{number}-{place}", lambda r=here, c=condition: sums(r, c.run(r)))
        for tokens, columns in totals.items():
            rows = pd.DataFrame(columns)
            rows["sequence"] = [cluster[i] for i in indices.tolist()]
            found.append(rows.assign(condition=names[place], tokens=tokens))
    return pd.concat(found, ignore_index=True), _sparsity(active)


def _active(reading: Reading, others: Mapping[str, Dictionary]) -> list[dict[str, Any]]:
    """Of each dictionary its active pairs on a batch, as used and without the cut."""
    acts = reading.acts[reading.where]
    n = n_active(reading.codes)
    counts = [(OWN, n, n)]
    counts += [(name, n_active(reading.codes_of(d)), n_active(d.codes(acts))) for name, d in others.items()]
    return [{"dictionary": name, "l0": a, "l0_own": b, "tokens": len(acts)} for name, a, b in counts]


def _sparsity(active: list[dict[str, Any]]) -> pd.DataFrame:
    if not active:
        return pd.DataFrame()
    total: Any = pd.DataFrame(active).groupby("dictionary", sort=False).sum()
    return total[["l0", "l0_own"]].div(total["tokens"], axis=0).reset_index()
