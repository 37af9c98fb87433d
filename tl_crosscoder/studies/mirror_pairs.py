"""Is a concept that both models have cut into two latents, one for each?  Latent Decoupling, beside what chance makes alike."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tl_crosscoder.analysis.base import evaluating
from tl_crosscoder.analysis.coactivation import (
    BINS,
    Coactivation,
    coactivation,
    divergence,
    pair_scales,
    strong,
)
from tl_crosscoder.analysis.matching_nulls import p_value
from tl_crosscoder.analysis.mirrors import mirrored
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.mirrors import mirror_figure
from tl_crosscoder.studies.by_latent import by_latent
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.weights import weights_sha256
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import refuse_unlike

GATES = {"only": 0.9, "leaning": 0.6}  # tuned: delta_norm above; base: below one minus it
WIDEST = "leaning"  # the gate whose pairs are looked at
APART = 0.5


@dataclass(frozen=True)
class MirrorResult(StudyResult):
    """``table``: a row a pair, most alike first: latents ``tuned, base``, ``cosine`` of the two directions, both's ``delta_norm``;
    of the tokens where one fires strongly (above .4 of its largest activation; ``n_strong``) the share where the other is silent
    (``divergence``, at most .1) or strong too (``coactivation``); ``_scaled``: relative to the larger of the pair's two largest
    scaled activations.

    ``counts``: pairs among the tuned-only and base-only (``only``) and the tuned- and base-leaning latents, and in as large random
    sets of live latents.  ``random``: divergence and co-activation of random pairs of a tuned- and a base-leaning latent.
    ``histograms``: of each pair in the table's order, tokens by bin (5 x 5) of the tuned and the base latent.
    """

    key: ClassVar = "mirror-pairs"
    title: ClassVar = "Concepts cut in two"
    text: ClassVar = "Two latents, one of each model, that write one direction: no change, if both models know what they fire on."
    notes: ClassVar = (
        "Random sets: live latents of any class, as many as there are of each kind. Divergence: of the tokens where one of the two "
        "fires above .4 of its largest activation, those where the other is at most at .1.",
    )
    index: ClassVar = ("tuned", "base")

    table: pd.DataFrame
    counts: pd.DataFrame
    random: pd.DataFrame
    histograms: list[list[list[int]]]
    at_least: float

    @property
    def verdict(self) -> str:
        """How many pairs, how many by chance, and on how many the two fire in different places."""
        text = " ".join(_said(row, self.at_least) for row in records(self.counts))
        known = self.table["divergence"].dropna() if len(self.table) else []
        if not len(known):
            return text
        mean, apart = self.table["coactivation"].mean(), np.asarray(known)
        chance = f" (of random pairs {self.random['divergence'].mean():.2f})" if len(self.random) else ""
        return (
            f"{text} In {(apart > APART).mean():.0%} of {len(apart):,} such pairs the two fire strongly on different tokens "
            f"(divergence above {APART:g}); mean divergence {apart.mean():.2f}{chance}, co-activation {mean:.2f}."
        )

    def plot(self) -> Drawing:
        """Cosine against divergence, and the tokens by both latents' bins."""
        histograms = np.array(self.histograms, dtype=np.int64).reshape(-1, BINS, BINS)
        return mirror_figure(self.table, self.random, histograms)


def _said(row: dict[str, Any], cosine: float) -> str:
    gate = row["gate"]
    sizes = f"{row['n_tuned']:,} tuned-{gate} and {row['n_base']:,} base-{gate} latents"
    if not row["n_tuned"] or not row["n_base"]:
        return f"Among {sizes} there can be no mirror pair."
    text = f"Among {sizes} {row['pairs']:,} mirror pairs (cosine > {cosine:g})"
    if row["null_mean"] is None:
        return f"{text}."
    chance = f"{row['null_mean']:.1f} on average, at most {row['null_max']:,.0f}, p = {row['p']:.2g}"
    return f"{text}, in random sets as large {chance}."


def mirror_pairs(
    crosscoder: Crosscoder,
    batches: Iterable,
    table: pd.DataFrame,
    *,
    cosine: float = 0.9,
    n_draws: int = 20,
    most: int = 20_000,
    seed: int = 0,
    parts: str | Path | None = None,
    progress: bool = True,
) -> MirrorResult:
    """Every pair (j, i) of a tuned-leaning and a base-leaning latent with ``cos(d_j^tuned, d_i^base) > cosine``, on ``batches``.

    ``table``: the latent table of ``batches`` (a store, or raw tensors).  ``most``: pairs that are looked at on tokens, the most
    alike first; all are counted.  An empty class is a result with its sizes.

    Source: Minder et al. 2025, arXiv:2504.02922, Latent Decoupling.
    """
    if crosscoder.n_models < 2:
        raise ValueError("mirror pairs are of a base and a tuned direction; this crosscoder has one model.")
    refuse_unlike(crosscoder, "a mirror pair")
    table = by_latent(table, crosscoder.d_sae)
    rows = crosscoder.decoder_rows().detach()
    kept = Parts(
        parts,
        study="mirror-pairs",
        weights=weights_sha256(crosscoder),
        fired=table["n_fired"].astype(float).tolist(),
        settings=[cosine, most, seed],
    )
    alive = torch.tensor(table.index.to_numpy()[table["n_fired"].to_numpy() > 0])
    classes = {gate: _classes(table, alive, edge) for gate, edge in GATES.items()}
    found, null = {}, _null(rows, alive, classes, cosine, n_draws, seed, kept, progress)
    for gate, (tuned, base) in classes.items():
        found[gate] = mirrored(rows, tuned, base, cosine=cosine, most=most if gate == WIDEST else 0)
    counts = [_count(gate, *classes[gate], found[gate].n, null[gate]) for gate in GATES]
    pairs = found[WIDEST]
    random = _random_pairs(*classes[WIDEST], pairs.pairs, len(pairs.pairs), seed)
    own, scaled = _histograms(crosscoder, batches, table, torch.cat([pairs.pairs, random]), progress)
    n, figures = len(pairs.pairs), _figures(own, scaled)
    delta = table["delta_norm"].to_numpy(float)
    tuned, base = pairs.pairs.numpy().T
    columns = {"tuned": tuned, "base": base, "cosine": pairs.cosine.double().numpy()}
    columns |= {"delta_norm_tuned": delta[tuned], "delta_norm_base": delta[base]}
    return MirrorResult(
        pd.DataFrame(columns | {name: values[:n] for name, values in figures.items()}),
        pd.DataFrame(counts),
        pd.DataFrame({name: figures[name][n:] for name in ("divergence", "coactivation")}),
        own[:n].tolist(),
        cosine,
    )


def _null(
    rows: Tensor,
    alive: Int[Tensor, " alive"],
    classes: dict[str, tuple[Tensor, Tensor]],
    cosine: float,
    n_draws: int,
    seed: int,
    kept: Parts,
    progress: bool,
) -> dict[str, list[int]]:
    """For each gate the pairs among two random sets of living latents as large as its classes, draw by draw."""
    null: dict[str, list[int]] = {gate: [] for gate in classes}
    draws = [(g, draw) for g, sides in classes.items() if all(map(len, sides)) for draw in range(n_draws)]
    for gate, draw in tracked(draws, "pairs of random latents", len(draws), progress):
        n_tuned, n_base = (len(side) for side in classes[gate])

        def drawn(n_tuned=n_tuned, n_base=n_base, draw=draw) -> int:
            generator = torch.Generator().manual_seed(seed * 9973 + draw)
            order = alive[torch.randperm(len(alive), generator=generator)]
            return mirrored(rows, order[:n_tuned], order[n_tuned : n_tuned + n_base], cosine=cosine, most=0).n

        null[gate].append(kept(f"null-{gate}-{draw}", drawn))
    return null


def _count(gate: str, tuned: Tensor, base: Tensor, pairs: int, null: list[int]) -> dict[str, Any]:
    chance = np.array(null or [np.nan], dtype=float)
    p = p_value(float(pairs), chance.tolist()) if null else np.nan
    sizes = {"gate": gate, "n_tuned": len(tuned), "n_base": len(base), "pairs": pairs}
    return sizes | {"null_mean": chance.mean(), "null_max": chance.max(), "p": p}


def _classes(table: pd.DataFrame, alive: Int[Tensor, " alive"], edge: float) -> tuple[Tensor, Tensor]:
    """The living tuned- and base-only (or -leaning) latents."""
    delta = torch.tensor(table["delta_norm"].to_numpy(float))[alive]
    return alive[delta > edge], alive[delta < 1 - edge]


def _random_pairs(
    tuned: Int[Tensor, " tuned"], base: Int[Tensor, " base"], known: Int[Tensor, "pair 2"], n: int, seed: int
) -> Int[Tensor, "random 2"]:
    """``n`` random pairs of the two classes at most, none of them ``known`` and none twice."""
    rng, taken = np.random.default_rng(seed), {tuple(pair) for pair in known.tolist()}
    drawn: list[tuple[int, int]] = []
    for _ in range(4 * n):
        pair = (int(rng.choice(tuned)), int(rng.choice(base)))
        if len(drawn) < n and pair not in taken:
            drawn.append(pair)
            taken.add(pair)
    return torch.tensor(drawn, dtype=torch.long).reshape(-1, 2)


def _histograms(
    crosscoder: Crosscoder,
    batches: Iterable,
    table: pd.DataFrame,
    pairs: Int[Tensor, "pair 2"],
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair, relative to each latent's own largest activation, and to the pair's largest scaled one."""
    if not len(pairs):
        nothing = np.zeros((0, BINS, BINS), dtype=np.int64)
        return nothing, nothing
    largest = torch.tensor(table["max_act"].to_numpy(float))
    norms = crosscoder.decoder_norms().detach().double().sum(1).cpu()
    together = [Coactivation(pairs, pair_scales(largest, pairs, weights)) for weights in (None, norms)]
    for x in tracked(batches, "where both fire", None, progress):
        with evaluating(crosscoder):
            codes = crosscoder.encode_sparse(x.to(crosscoder.W_dec.device, crosscoder.W_dec.dtype))
        for each in together:
            each.update(codes.of_model(TUNED), codes.of_model(BASE))
    return together[0].histograms, together[1].histograms


def _figures(own: np.ndarray, scaled: np.ndarray) -> dict[str, np.ndarray]:
    figures = {"divergence": divergence(own), "coactivation": coactivation(own), "n_strong": strong(own)}
    return figures | {"divergence_scaled": divergence(scaled), "coactivation_scaled": coactivation(scaled)}
