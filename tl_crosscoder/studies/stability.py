"""Does another seed, or other data, find the same latents?  Matched one to one, beside what chance would match."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tl_crosscoder.analysis.acts_matching import SharedActs, acts_of, match_acts
from tl_crosscoder.analysis.decoder_norms import classify, delta_norm
from tl_crosscoder.analysis.matching import MATCHED, Matching, match_latents
from tl_crosscoder.analysis.matching_nulls import (
    p_value,
    random_acts_null,
    random_null,
    rotation_null,
    shift_null,
)
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.stability import stability_figure
from tl_crosscoder.studies.by_latent import by_latent
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.weights import weights_sha256
from tl_crosscoder.widths import refuse_unlike

ALIVE = "all"
NULLS = ("rotation", "shift", "random")


@dataclass(frozen=True)
class StabilityResult(StudyResult):
    """``table``: a row a class and way (``by`` decoder directions, or activations): latents of it in ``n_a`` and ``n_b``, pairs
    ``matched`` within the class, ``share`` of the smaller side, ``upper_bound`` (not one to one), ``mean`` similarity of the pairs;
    ``rotation`` (of directions), ``shift`` (of activations) and ``random``: the nulls' mean share, ``p_...`` of the share under
    each; ``elsewhere``: the share of a's latents of this class whose partner among *all* living latents of b is as similar.

    ``pairs``: a row a pair of living latents: ``a, b, cosine`` (and ``correlation`` where there were activations), both classes.
    """

    key: ClassVar = "stability"
    title: ClassVar = "Would another run find them?"
    text: ClassVar = "Latents of two crosscoders matched one to one; a class is matched within itself."
    notes: ClassVar = (
        "Rotation: the same after turning one side's directions at random. Shift: after turning each document's tokens for one "
        "side. Random: as many living latents of any class.",
    )
    index: ClassVar = ("class", "by")

    table: pd.DataFrame
    pairs: pd.DataFrame
    at_least: float
    tokens: int

    @property
    def verdict(self) -> str:
        """The share recovered of all latents and of the tuned-only ones, by each way."""
        rows = [row for row in self.table.to_dict("records") if row["class"] in (ALIVE, "tuned_only")]
        return " ".join(dict.fromkeys(_sentence(row, self.at_least) for row in rows))

    def plot(self) -> Drawing:
        """The share matched in each class beside the nulls, and how similar the pairs are."""
        return stability_figure(self.table, self.pairs, self.at_least)


def _sentence(row: dict[str, Any], at_least: float) -> str:
    what = "living" if row["class"] == ALIVE else row["class"].replace("_", "-")
    measure = "cosine" if row["by"] == "directions" else "correlation of activations"
    sizes = f"{row['n_a']:,} and {row['n_b']:,} {what} latents"
    if not row["n_a"] or not row["n_b"]:
        return f"Of {sizes} none can be matched."
    text = f"Of {sizes} {row['matched']:,} ({row['share']:.0%}) are matched with {measure} ≥ {at_least:g}"
    names = {
        "rotation": "after a rotation",
        "shift": "after a shift of the tokens",
        "random": "of random latents",
    }
    chance = {said: row[null] for null, said in names.items()}
    known = [f"{value:.1%} {name}" for name, value in chance.items() if value == value]
    return f"{text} ({', '.join(known)})." if known else f"{text}."


def stability(
    a: Crosscoder,
    b: Crosscoder,
    batches: Iterable | None = None,
    *,
    alive: tuple[pd.Series, pd.Series] | None = None,
    at_least: float = MATCHED,
    n_draws: int = 10,
    most_tokens: int = 100_000,
    seed: int = 0,
    parts: str | Path | None = None,
    progress: bool = True,
) -> StabilityResult:
    """The latents that two crosscoders of one pair and hook share, beside what chance would match.

    Nulls: directions after a rotation of one side, activations after a turn of one side's tokens within each document (bare tensors
    are one), and of both as many random living latents.

    ``batches``: activations that neither was trained on, for the correlation on the same tokens.  ``alive``: for each the number of
    firings of every latent (``table["n_fired"]``); without it those that fire on ``batches``, without both all of them.
    ``at_least``: the similarity of a match.

    Raises ShapeMismatch for crosscoders of other sizes, and of models of unlike width.
    """
    if (a.n_models, a.d_in) != (b.n_models, b.d_in):
        raise ShapeMismatch(
            f"crosscoders of [model={a.n_models}, d_in={a.d_in}] and [model={b.n_models}, d_in={b.d_in}]: "
            "only those of one pair of models at one hook can be compared"
        )
    refuse_unlike(a, "the rotation of one side's directions")
    acts = None if batches is None else acts_of((a, b), batches, most_tokens)
    fired = _firings(a, b, alive, acts)
    labels = [classify(_delta(each).tolist(), n.tolist()) for each, n in zip((a, b), fired, strict=True)]
    rows = [each.decoder_rows().detach().float() for each in (a, b)]
    living = [(n > 0).nonzero()[:, 0] for n in fired]
    kept = Parts(
        parts,
        study="stability",
        weights=[weights_sha256(a), weights_sha256(b)],
        fired=[n.tolist() for n in fired],
        acts=None if acts is None else _digest(acts),
        settings=[at_least, n_draws, seed],
    )
    names = [ALIVE] + [name for name in ("tuned_only", "base_only", "shared", "other") if a.n_models > 1]
    whole = match_latents(rows[0][living[0]], rows[1][living[1]])
    close = set(living[0][whole.pairs[whole.similarity >= at_least, 0]].tolist())
    table = []
    for name in tracked(names, "latents of both runs", len(names), progress):
        mine = [_of_class(ids, kinds, name) for ids, kinds in zip(living, labels, strict=True)]
        found = whole if name == ALIVE else match_latents(rows[0][mine[0]], rows[1][mine[1]])

        part, both = name.replace("_", "-"), all(map(len, mine))
        how = (mine, at_least, n_draws, seed)
        chance = kept(f"nulls-{part}", lambda h=how: _direction_nulls(rows, living, *h)) if both else {}
        elsewhere = float(np.mean([j in close for j in mine[0].tolist()])) if len(mine[0]) else np.nan
        table.append({"class": name, "by": "directions"} | _row(found, at_least, chance, elsewhere))
        if acts is not None:
            together = match_acts(acts.a, acts.b, *mine)
            chance = kept(f"shifts-{part}", lambda h=how, x=acts: _acts_nulls(x, living, *h)) if both else {}
            table.append({"class": name, "by": "activations"} | _row(together, at_least, chance, np.nan))
    return StabilityResult(
        pd.DataFrame(table),
        _pairs(whole, living, labels, acts),
        at_least,
        0 if acts is None else len(acts.document),
    )


def _firings(
    a: Crosscoder, b: Crosscoder, alive: tuple[pd.Series, pd.Series] | None, acts: SharedActs | None
) -> list[Tensor]:
    """How often each latent of both fired: as ``alive`` says, or in ``acts``, or without either once."""
    if alive is not None:
        whole = [by_latent(n, each.d_sae) for n, each in zip(alive, (a, b), strict=True)]
        return [torch.tensor(n.to_numpy(float)) for n in whole]
    if acts is not None:
        return [torch.from_numpy(np.diff(each.indptr)).double() for each in (acts.a, acts.b)]
    return [torch.ones(each.d_sae, dtype=torch.float64) for each in (a, b)]


def _delta(crosscoder: Crosscoder) -> Tensor:
    """``delta_norm``; of one model there is none."""
    norms = crosscoder.decoder_norms().detach()
    return delta_norm(norms) if crosscoder.n_models > 1 else torch.full((crosscoder.d_sae,), 0.5)


def _of_class(ids: Int[Tensor, " alive"], kinds: list[str], name: str) -> Int[Tensor, " latent"]:
    """The living latents of one class."""
    return ids if name == ALIVE else ids[[kinds[j] == name for j in ids.tolist()]]


def _direction_nulls(
    rows: list[Tensor], living: list[Tensor], mine: list[Tensor], at_least: float, n: int, seed: int
) -> dict[str, list[float]]:
    """The share matched by direction in each draw of each null."""
    found = {"rotation": rotation_null(rows[0][mine[0]], rows[1][mine[1]], n_draws=n, seed=seed)}
    if chosen := _chosen(living, mine):
        found["random"] = random_null(rows[0], rows[1], living[0], living[1], chosen, n_draws=n, seed=seed)
    return {name: [matching.share(at_least) for matching in null] for name, null in found.items()}


def _acts_nulls(
    acts: SharedActs, living: list[Tensor], mine: list[Tensor], at_least: float, n: int, seed: int
) -> dict[str, list[float]]:
    """The share matched by activations in each draw of each null."""
    found = {"shift": shift_null(acts, *mine, n_draws=n, seed=seed)}
    if chosen := _chosen(living, mine):
        found["random"] = random_acts_null(acts, living[0], living[1], chosen, n_draws=n, seed=seed)
    return {name: [matching.share(at_least) for matching in null] for name, null in found.items()}


def _chosen(living: list[Tensor], mine: list[Tensor]) -> tuple[int, int] | None:
    """The sizes of a class; None for all living latents, which are no choice."""
    sizes = len(mine[0]), len(mine[1])
    return None if sizes == (len(living[0]), len(living[1])) else sizes


def _digest(acts: SharedActs) -> str:
    """sha256 of all activations and of where documents begin."""
    whole = hashlib.sha256(acts.document.tobytes())
    for each in (acts.a, acts.b):
        for part in (each.data, each.indices, each.indptr):
            whole.update(part.tobytes())
    return whole.hexdigest()


def _row(
    found: Matching, at_least: float, chance: dict[str, list[float]], elsewhere: float
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "n_a": len(found.best_a),
        "n_b": len(found.best_b),
        "matched": found.matched(at_least),
        "share": found.share(at_least),
        "upper_bound": found.upper_bound(at_least),
        "mean": found.mean(),
        "elsewhere": elsewhere,
    }
    for name in NULLS:
        null = chance.get(name) or []
        row[name] = float(np.mean(null)) if null else np.nan
        row[f"p_{name}"] = p_value(found.share(at_least), null) if null else np.nan
    return row


def _pairs(
    whole: Matching, living: list[Tensor], labels: list[list[str]], acts: SharedActs | None
) -> pd.DataFrame:
    """A row a pair of living latents, the most similar first."""
    a, b = living[0][whole.pairs[:, 0]].tolist(), living[1][whole.pairs[:, 1]].tolist()
    table = pd.DataFrame({"a": a, "b": b, "cosine": whole.similarity.double().numpy()})
    table["class_a"], table["class_b"] = [labels[0][j] for j in a], [labels[1][i] for i in b]
    if acts is not None:
        table["correlation"] = list(_correlations(acts.a, acts.b, a, b))
    return table.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)


def _correlations(acts_a, acts_b, a: list[int], b: list[int]) -> Iterator[float]:
    """Of each pair; NaN where one of the two never fires here."""
    for j, i in zip(a, b, strict=True):
        one, other = (each[:, [k]].toarray().ravel() for each, k in ((acts_a, j), (acts_b, i)))
        varied = one.any() and other.any() and min(np.ptp(one), np.ptp(other)) > 0
        yield float(np.corrcoef(one, other)[0, 1]) if varied else np.nan
