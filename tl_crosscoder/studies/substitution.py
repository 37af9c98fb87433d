"""How much of the behaviour of the tuned model do chosen latents carry?  The paper's causal table.

The residual stream of the *tuned* model is replaced at the hook by the base model's plus what some latents
would change, and the rest of the tuned model runs on it.  The closer its predictions come to those of the
untouched tuned model (KL), the more of the change the latents hold.

Source: Minder et al. 2025, arXiv:2504.02922, causal experiments; the bootstrap over conversations and the
paired difference are ours (the paper treats tokens as independent, which makes intervals too narrow)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from tl_crosscoder.analysis.base import evaluating
from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.dictionary.codes import Codes
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.report import Drawing
from tl_crosscoder.report.plots import kl_bars
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.where import kept_tokens
from tl_crosscoder.types import BASE, TUNED

FIRST = 9  # predictions of each assistant turn counted as its beginning
#: a condition: raw activations to put into the tuned model, from what was captured
Condition = Callable[["Captured"], Tensor]


@dataclass(frozen=True)
class Captured:
    """One batch of text in both models: what every condition is built from."""

    batch: TokenBatch
    acts: Float[Tensor, "seq pos model d_in"]
    where: Bool[Tensor, "seq pos"]
    codes: Codes  # of the tokens in ``where``, in order
    rows: Float[Tensor, "d_sae model d_in"]

    def written(self, latents: Tensor | None, model: int | None = None) -> Float[Tensor, "token d_in"]:
        """``Σ_{j in latents} f_j (d_j^tuned − d_j^base)``, or ``Σ f_j d_j^model``; None: all latents."""
        codes = self.codes
        if latents is not None:
            codes = codes.with_values(codes.values * latents[codes.latents])
        rows = self.rows[:, TUNED] - self.rows[:, BASE] if model is None else self.rows[:, model]
        return codes.decode(rows)

    def put(self, values: Float[Tensor, "token d_in"]) -> Float[Tensor, "seq pos d_in"]:
        """The tuned activations with ``values`` at the tokens in ``where``."""
        out = self.acts[:, :, TUNED].float().clone()
        out[self.where] = values
        return out

    def at(self, model: int) -> Float[Tensor, "token d_in"]:
        return self.acts[:, :, model][self.where].float()


@dataclass(frozen=True)
class SubstitutionResult(StudyResult):
    """``table``: one row for each condition and set of tokens; ``per_sequence``: the KL sums that the intervals come from.

    Columns of ``table``: ``condition, tokens`` (all, first 9, rest), ``kl`` (nats per predicted token, to the
    tuned model), ``ci_low, ci_high`` (95 %, bootstrap over sequences), ``recovered`` (share of the KL of
    ``none`` that is gone), ``n_tokens``, ``n_latents``. ``paired``: difference in KL top − bottom of each
    split, with its interval; negative: the top half carries more."""

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
    template_tokens: bool = True,
    drop: Drop | None = None,
    seed: int = 0,
    max_tokens: int = 4096,
    n_bootstrap: int = 2000,
) -> SubstitutionResult:
    """KL to the tuned model under each condition, with intervals from a bootstrap clustered by conversation.

    ==================================== ==================================================================================
    condition                            what the tuned model gets at the hook
    ==================================== ==================================================================================
    ``none``                             the base activations: the whole change is missing
    ``all``                              base activations + every latent's change
    ``error``                            tuned activations − every latent's change: only what the crosscoder did not capture
    ``template``                         base activations, tuned ones at the chat template's tokens
    ``top N ranked``                     base activations + the change of the N latents highest in ``ranking``
    ``random N``                         the same for N random live latents outside the top, mean of ``n_random`` draws
    ``delta_norm top/bottom``            halves of the ``n_specific`` latents with the highest ``delta_norm``
    ``latent scaling top/bottom``        halves of the same latents by rank(nu_error) + rank(nu_recon), low first
    ==================================== ==================================================================================

    Tokens that ``drop`` (as in :func:`capture`) keeps out of training, such as the first of a sequence and attention
    sinks, keep the tuned activations in every condition.  Predictions are counted where the *next* token is the
    assistant's; in text without an assistant, at every captured position.  "First 9" are the first nine predictions
    of each assistant turn, the one made at the template's last token included (the paper leaves that one out).
    ``n_specific`` defaults to a tenth of the live latents.  Latents with an undefined value of a column are left
    out of its split.
    """
    if not len(corpus):
        raise EmptyData("substitution needs at least one sequence of text.")
    rng = np.random.default_rng(seed)
    sets = _latent_sets(table, ranking, top, n_specific, n_random, rng)
    rows = crosscoder.raw_rows().detach()
    conditions = _fixed_conditions(template_tokens) | {
        name: _with_change_of(torch.as_tensor(mask)) for name, mask in sets.items()
    }
    cluster = corpus.conversations().tolist()  # answers to one prompt are resampled together
    rows_of_sequences = []
    for indices, captured in _captured(crosscoder, pair, corpus, rows, drop or Drop(), max_tokens):
        counted = {"all": _predictions(captured)}
        begin = _first_of_each_run(counted["all"], FIRST)
        counted |= {f"first {FIRST}": begin, "rest": counted["all"] & ~begin}
        clean = _log_probs(pair.run(captured.batch).to(rows.device), counted["all"])
        for name, condition in conditions.items():
            acts = condition(captured)
            logits = pair.run(captured.batch, lambda h, hook=None, acts=acts: acts.to(h)).to(rows.device)  # noqa: ARG005
            kl = torch.zeros(acts.shape[:-1], dtype=torch.float64, device=acts.device)
            kl[counted["all"]] = _kl(clean, _log_probs(logits, counted["all"]))
            for tokens, where in counted.items():
                sums, counts = (kl * where).sum(-1).tolist(), where.sum(-1).tolist()
                rows_of_sequences += [
                    {"condition": name, "tokens": tokens, "sequence": cluster[i], "kl_sum": s, "n": n}
                    for i, s, n in zip(indices, sums, counts, strict=True)
                ]
    per_sequence = _merge_draws(pd.DataFrame(rows_of_sequences))
    sizes = {name: int(mask.sum()) for name, mask in sets.items()}
    return SubstitutionResult(
        _summarise(per_sequence, sizes, n_bootstrap, seed),
        _paired(per_sequence, n_bootstrap, seed),
        per_sequence,
    )


def _latent_sets(table, ranking, top, n_specific, n_random, rng) -> dict[str, np.ndarray]:
    alive = table[table["n_fired"] > 0]
    n_specific = min(n_specific or max(2, len(alive) // 10), len(alive))
    order = ranked(table, ranking)
    sets: dict[str, Sequence[int]] = {f"top {n} ranked": order[:n] for n in top}
    others = sorted(set(alive.index) - set(order[: max(top, default=0)]))
    for n in top:
        for draw in range(n_random):
            sets[f"random {n}#{draw}"] = rng.choice(others, size=min(n, len(others)), replace=False).tolist()
    specific = table.loc[ranked(table, "delta_norm")[:n_specific]]
    sets |= _halves("delta_norm", specific.index.tolist())
    scaled = specific.query("-0.1 <= nu_error <= 2 and -0.1 <= nu_recon <= 2")
    scaled = scaled.assign(rank_sum=scaled["nu_error"].rank() + scaled["nu_recon"].rank())
    sets |= _halves("latent scaling", scaled.sort_values("rank_sum", kind="stable").index.tolist())
    return {name: np.isin(np.arange(len(table)), np.asarray(ids)) for name, ids in sets.items()}


def _halves(name: str, order: list[int]) -> dict[str, Sequence[int]]:
    half = len(order) // 2
    return {f"{name} top": order[:half], f"{name} bottom": order[half : 2 * half]} if half else {}


def _fixed_conditions(template_tokens: bool) -> dict[str, Condition]:
    def template(c: Captured) -> Tensor:
        keep = c.batch.template[c.where][:, None]
        return c.put(torch.where(keep, c.at(TUNED), c.at(BASE)))

    fixed: dict[str, Condition] = {
        "none": lambda c: c.put(c.at(BASE)),
        "all": lambda c: c.put(c.at(BASE) + c.written(None)),
        "error": lambda c: c.put(c.at(TUNED) - c.written(None)),
    }
    return fixed | ({"template": template} if template_tokens else {})


def _with_change_of(latents: Tensor) -> Condition:
    return lambda c: c.put(c.at(BASE) + c.written(latents.to(c.acts.device)))


def _captured(
    crosscoder: Crosscoder, pair: ModelPair, corpus: Corpus, rows: Tensor, drop: Drop, max_tokens: int
) -> Iterator[tuple[list[int], Captured]]:
    for indices, batch in corpus.batches(max_tokens):
        acts = pair.capture(batch).to(rows.device)
        where = kept_tokens(batch, acts, drop)
        with evaluating(crosscoder):
            codes = crosscoder.encode_sparse(acts[where].float())
        yield indices.tolist(), Captured(batch.to(rows.device), acts, where, codes, rows)


def _predictions(captured: Captured) -> Bool[Tensor, "seq pos"]:
    """True where the next token is counted: the assistant's if there is one in the sequence, else any captured token."""
    batch = captured.batch
    nothing = torch.zeros_like(captured.where[:, :1])
    next_is_assistant = torch.cat([batch.assistant[:, 1:], nothing], 1)
    next_exists = torch.cat([batch.attention_mask[:, 1:], nothing], 1)
    chat = batch.assistant.any(-1, keepdim=True)
    return captured.where & torch.where(chat, next_is_assistant, next_exists)


def _first_of_each_run(where: Bool[Tensor, "seq pos"], n: int) -> Bool[Tensor, "seq pos"]:
    """The first ``n`` positions of each contiguous run."""
    out, run = torch.zeros_like(where), torch.zeros(len(where), dtype=torch.long, device=where.device)
    for p in range(where.shape[1]):
        run = torch.where(where[:, p], run + 1, 0)
        out[:, p] = where[:, p] & (run <= n)
    return out


def _log_probs(
    logits: Float[Tensor, "seq pos d_vocab"], where: Bool[Tensor, "seq pos"]
) -> Float[Tensor, "token d_vocab"]:
    return logits[where].float().log_softmax(-1)


def _kl(
    clean: Float[Tensor, "token d_vocab"], patched: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """KL(clean ‖ patched) of each prediction, in nats."""
    return (clean.exp() * (clean - patched)).sum(-1).double()


def _merge_draws(drawn: pd.DataFrame) -> pd.DataFrame:
    """``random N#draw`` -> ``random N``, the mean of the draws."""
    drawn[["condition", "draw"]] = [(*name.split("#"), "0")[:2] for name in drawn["condition"]]
    keys = ["condition", "tokens", "sequence"]
    drawn = drawn.pivot_table(
        values=["kl_sum", "n"], index=[*keys, "draw"], aggfunc="sum", sort=False
    ).reset_index()
    merged = drawn.pivot_table(values=["kl_sum", "n"], index=["condition", "tokens", "sequence"], sort=False)
    return merged.reset_index()


def _summarise(
    per_sequence: pd.DataFrame, sizes: dict[str, int], n_bootstrap: int, seed: int
) -> pd.DataFrame:
    rows = []
    named = {name.split("#")[0]: n for name, n in sizes.items()}
    for condition in per_sequence["condition"].unique():
        for tokens in per_sequence["tokens"].unique():
            here = per_sequence.query("condition == @condition and tokens == @tokens")
            n = here["n"].to_numpy()
            kl, low, high = ratio_interval(here["kl_sum"].to_numpy(), n, n_bootstrap, seed)
            counts = {"n_tokens": int(n.sum()), "n_latents": named.get(condition, np.nan)}
            rows.append(
                {"condition": condition, "tokens": tokens, "kl": kl, "ci_low": low, "ci_high": high, **counts}
            )
    none = {row["tokens"]: row["kl"] for row in rows if row["condition"] == "none"}
    for row in rows:
        row["recovered"] = 1 - row["kl"] / none[row["tokens"]] if none[row["tokens"]] > 0 else np.nan
    return pd.DataFrame(rows)


def _paired(per_sequence: pd.DataFrame, n_bootstrap: int, seed: int) -> pd.DataFrame:
    rows = []
    for split in ("delta_norm", "latent scaling"):
        for tokens, group in per_sequence.groupby("tokens", sort=False):
            wide = group.pivot(index="sequence", columns="condition", values="kl_sum")
            if f"{split} top" in wide:
                n = group.groupby("sequence")["n"].first().to_numpy()
                gap = (wide[f"{split} top"] - wide[f"{split} bottom"]).to_numpy()
                value, low, high = ratio_interval(gap, n, n_bootstrap, seed)
                interval = {"kl_top_minus_bottom": value, "ci_low": low, "ci_high": high}
                rows.append({"split": split, "tokens": tokens, **interval})
    return pd.DataFrame(rows)


def ratio_interval(
    sums: np.ndarray, counts: np.ndarray, n_bootstrap: int, seed: int
) -> tuple[float, float, float]:
    """``Σ sums / Σ counts`` with its 95 % percentile interval when whole clusters are resampled.

    NaN where nothing was counted; with a single cluster the interval is NaN.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    if not len(sums):
        return float("nan"), float("nan"), float("nan")
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return value, float("nan"), float("nan")
    interval = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=n_bootstrap,
        batch=256,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return value, float(interval.low), float(interval.high)
