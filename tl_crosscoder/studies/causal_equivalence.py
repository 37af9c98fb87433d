"""Does a latent that both models share do the same in both?

The latent is taken out of each model at the same tokens, and the two series of effects (KL of the next-token prediction) are
correlated: **causal equivalence**, CE.  Decoders that point the same way do not imply it, since what reads them may differ.

CE alone is generous.  Both effects grow about with the square of the activation, so any two latents that fire with
varying strength correlate.  Beside it stand therefore the *partial* correlation given the activation and its square, the CE
of *mismatched* latents (the base effects of one with the tuned effects of another of like magnitude, token by token in the order
of their activations), and the cosine of the two models' changes in the logits, which needs no comparison across tokens.

Source: the card of a published Gemma-2-2B crosscoder ("papergrade"), whose files and columns ``write`` keeps.  There the
probes are the last tokens of 64 texts, so that only latents active on an eighth of them can be scored; here they are the
latent's own tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.cosine_vs_causal import cosine_vs_causal
from tl_crosscoder.files import write_atomically
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.probes import active_probes, last_token_probes
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.single_ablation import single_ablations
from tl_crosscoder.studies.statistics import (
    correlation,
    correlation_interval,
    partial_correlation,
    rank_correlation,
)
from tl_crosscoder.studies.weights import weights_sha256

LEAST = 8  # probes below which a correlation says nothing
ALIKE, DIFFERENT = 0.7, 0.5  # decoders alike above this cosine, effects different below this CE
LATENTS_A_PART, NEIGHBOURS = 16, 5
#: our columns -> those of the published ``causal_validation.csv``
PUBLISHED = {
    "latent": "feature",
    "class": "class",
    "delta_norm": "delta_norm",
    "cosine": "cosine",
    "mean_kl_base": "mean_KL_A",
    "mean_kl_tuned": "mean_KL_B",
    "ce": "pearson_CE",
    "n_probes": "n_probes_fired",
}


@dataclass(frozen=True)
class EquivalenceResult(StudyResult):
    """``table``: one row a latent; ``effects``: one row a probe (not written to JSON).

    Columns of ``table``: ``latent, class, delta_norm, cosine`` (of its two decoder rows), ``mean_kl_base, mean_kl_tuned``,
    ``ce`` with ``ce_low, ce_high`` (95 %, bootstrap over the probes' conversations), ``spearman``, ``partial`` (given the
    activation and its square), ``mismatched`` (mean over the five latents nearest in magnitude), ``logit_cosine`` (mean over
    probes), ``n_probes``.
    A correlation over fewer than 8 probes, or of effects that do not vary, is NaN.
    """

    key: ClassVar = "equivalence"
    title: ClassVar = "Does a shared latent do the same in both models?"
    text: ClassVar = (
        "Each latent is taken out of both models at the same tokens; causal equivalence (CE) is the correlation of the two effects "
        "on the next prediction. Mismatched: the same of two different latents, which is what varying activations alone give."
    )
    notes: ClassVar = (
        "Intervals: 95 %, bootstrap over the probes' conversations. "
        "A latent with fewer than 8 probes, or without an effect, has no CE.",
    )
    index: ClassVar = ("latent",)

    table: pd.DataFrame
    effects: pd.DataFrame
    variant: str

    @property
    def verdict(self) -> list[str]:
        """What the shared latents do, then each other class, and how much CE there is without any equivalence."""
        scored: Any = self.table[self.table["ce"].notna()]
        said = [self._shared(scored[scored["class"] == "shared"])]
        for name, rows in scored[scored["class"] != "shared"].groupby("class"):
            said.append(f"{_latents(len(rows), name)}: median CE {rows['ce'].median():.2f}.")
        silent = self.table.query("ce != ce")
        if len(silent):
            few = int((silent["n_probes"] < LEAST).to_numpy().sum())
            why = {
                f"with fewer than {LEAST} probes": few,
                "without an effect in one of the models": len(silent) - few,
            }
            said.append(
                f"No CE for {' and '.join(f'{_latents(n)} {words}' for words, n in why.items() if n)}."
            )
        return said

    def _shared(self, rows: Any) -> str:
        alike = rows[rows["cosine"] > ALIKE]
        if alike.empty:
            return f"No shared latent with decoder cosine above {ALIKE} could be scored."
        differ, surely = (int((alike[end] < DIFFERENT).sum()) for end in ("ce", "ce_high"))
        median = alike[["ce", "partial", "mismatched", "logit_cosine"]].median()
        return (
            f"Of {_latents(len(alike), 'shared')} with decoder cosine above {ALIKE}, {differ} ({differ / len(alike):.0%}) have a "
            f"causal equivalence below {DIFFERENT}, {surely} of them with its whole interval (median {median['ce']:.2f}; given the "
            f"activation {median['partial']:.2f}; of mismatched latents {median['mismatched']:.2f}; cosine of the logit changes "
            f"{median['logit_cosine']:.2f})."
        )

    def plot(self) -> Drawing:
        """CE against the decoder cosine, one dot a latent."""
        return cosine_vs_causal(self.table, ALIKE, DIFFERENT)

    def write(self, directory: str | Path) -> list[Path]:
        """``causal_validation.csv``, the published columns first, and ``cosine_vs_causal.png`` with its PDF."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "causal_validation.csv"
        further = [name for name in self.table if name not in PUBLISHED]
        table = self.table[[*PUBLISHED, *further]].set_axis([*PUBLISHED.values(), *further], axis=1)
        write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))
        return [path, *(self.plot().save(folder / f"cosine_vs_causal.{kind}") for kind in ("png", "pdf"))]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without ``effects``."""
        return {name: part for name, part in super().to_dict().items() if name != "effects"}


def causal_equivalence(
    crosscoder: Crosscoder,
    pair: ModelPair,
    store: PairedActivations,
    table: pd.DataFrame,
    *,
    latents: Sequence[int] | None = None,
    n_shared: int = 80,
    n_other: int = 30,
    n_probes: int = 32,
    variant: Literal["active", "published"] = "active",
    n_bootstrap: int = 1000,
    max_tokens: int = 2048,
    seed: int = 0,
    parts: str | Path | None = None,
    progress: bool = True,
) -> EquivalenceResult:
    """The causal equivalence of ``latents``: by default ``n_shared`` random shared ones and ``n_other`` of each other class.

    ``store``: activations of the pair, best those held out.  ``variant``: "active" draws ``n_probes`` of each latent's own active
    tokens, weak and strong ones alike; "published" takes the last tokens of ``n_probes`` texts.  ``max_tokens``: a forward
    pass.  ``parts``: a folder where finished parts are kept, so that the same call goes on after a kill.

    Raises EmptyData where there is no live latent to ask about, PairMismatch for another pair than the store's.
    """
    store.check_against(pair)
    chosen = _chosen(table, n_shared, n_other, seed) if latents is None else [int(j) for j in latents]
    if not chosen:
        raise EmptyData("causal_equivalence needs at least one latent that fires.")
    if variant == "active":
        probes = active_probes(crosscoder, store, chosen, n_probes, seed=seed, progress=progress)
    else:
        probes = last_token_probes(crosscoder, store, chosen, n_probes, seed=seed)
    keep = Parts(
        parts,
        study="equivalence",
        models=pair.fingerprint,
        weights=weights_sha256(crosscoder),
        corpus=store.corpus.sha256,
        probes=hashlib.sha256(probes.to_csv(index=False).encode()).hexdigest(),
    )
    groups = [chosen[at : at + LATENTS_A_PART] for at in range(0, len(chosen), LATENTS_A_PART)]
    found = []
    for group in tracked(groups, "taking latents out of both models", len(groups), progress):
        here = probes.query("latent in @group")
        ablate = partial(single_ablations, crosscoder, pair, store.corpus, here, max_tokens=max_tokens)
        found += keep(f"latents-{group[0]}", lambda here=here, ablate=ablate: records(here.join(ablate())))
    columns = ["latent", "value", "sequence", "position", "kl_base", "kl_tuned", "logit_cosine"]
    effects = pd.DataFrame(found, columns=columns)
    numbers = effects.columns.difference(["latent", "sequence", "position"])
    effects[numbers] = effects[numbers].astype(float)
    conversation = np.asarray(store.corpus.conversations())
    effects["conversation"] = conversation[effects["sequence"].to_numpy(int)]
    return EquivalenceResult(_scored(effects, chosen, table, n_bootstrap, seed), effects, variant)


def _chosen(table: pd.DataFrame, n_shared: int, n_other: int, seed: int) -> list[int]:
    """Random latents of each class that fire often enough to be scored."""
    rng = np.random.default_rng(seed)
    live = table[table["n_fired"] >= LEAST]
    drawn = []
    for name, rows in live.groupby("class"):
        n = n_shared if name == "shared" else n_other
        drawn += rng.permutation(rows.index.to_numpy())[:n].tolist()
    return sorted(drawn)


def _scored(
    effects: pd.DataFrame, chosen: list[int], table: pd.DataFrame, n_bootstrap: int, seed: int
) -> pd.DataFrame:
    series = {int(j): rows.sort_values("value", kind="stable") for j, rows in _by_latent(effects)}
    norms = table["norm_base"].to_numpy(float) + table["norm_tuned"].to_numpy(float)
    null = _mismatched(series, dict(zip(table.index.tolist(), norms.tolist(), strict=True)))
    rows = []
    for j in chosen:
        here = series.get(j, effects.iloc[:0])
        f, base, tuned = (here[name].to_numpy(float) for name in ("value", "kl_base", "kl_tuned"))
        row = {"latent": j} | {name: table.loc[j, name] for name in ("class", "delta_norm", "cosine")}
        row |= {
            "mean_kl_base": base.mean() if len(f) else np.nan,
            "mean_kl_tuned": tuned.mean() if len(f) else np.nan,
        }
        enough = len(f) >= LEAST
        low, high = (
            correlation_interval(
                base, tuned, clusters=here["conversation"].to_numpy(int), n_resamples=n_bootstrap, seed=seed
            )
            if enough
            else (np.nan, np.nan)
        )
        row |= {
            "ce": correlation(base, tuned) if enough else np.nan,
            "ce_low": low,
            "ce_high": high,
            "spearman": rank_correlation(base, tuned) if enough else np.nan,
            "partial": partial_correlation(base, tuned, f) if enough else np.nan,
            "mismatched": null.get(j, np.nan),
            "logit_cosine": here["logit_cosine"].mean() if here["logit_cosine"].notna().any() else np.nan,
            "n_probes": len(f),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _latents(n: int, of_class: str = "") -> str:
    """``3 shared latents``."""
    return f"{n:,} {of_class + ' ' if of_class else ''}latent{'' if n == 1 else 's'}"


def _by_latent(rows: pd.DataFrame) -> Any:
    return rows.groupby("latent")


def _mismatched(series: dict[int, pd.DataFrame], norms: dict[int, float]) -> dict[int, float]:
    """CE of each latent's base effects with the tuned effects of others that write about as much on their probes.

    The probes of the two are paired in the order of their activations.
    """
    scored = {j: rows for j, rows in series.items() if len(rows) >= LEAST}
    written = {j: float(rows["value"].to_numpy().mean()) * norms[j] for j, rows in scored.items()}
    found = {}
    for j, own in written.items():
        others = sorted(set(written) - {j}, key=lambda i: abs(np.log(written[i] / own)))[:NEIGHBOURS]
        values = np.array([_in_order(scored[j], scored[i]) for i in others])
        values = values[~np.isnan(values)]
        found[j] = float(values.mean()) if len(values) else np.nan
    return found


def _in_order(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """The correlation of two series sorted by activation, the longer one thinned to the length of the other."""
    n = min(len(a), len(b))
    base, tuned = a["kl_base"].to_numpy(float), b["kl_tuned"].to_numpy(float)
    take = [values[np.linspace(0, len(values) - 1, n).round().astype(int)] for values in (base, tuned)]
    return correlation(*take)
