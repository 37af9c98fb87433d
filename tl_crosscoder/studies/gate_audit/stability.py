"""Do crosscoders that differ in nothing but their seed find the same gated latents?

Each pair of seeds is matched one to one by the cosine of the latents' rows (both models' directions as one vector), and
held against two nulls: one side rotated at random, and as many random live latents.  The same again without lexical
latents.  A second, independent look: the correlation of the activations of the matched latents on tokens that neither seed
was trained on, and that without the tokens of their strongest words."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.base import evaluating
from tl_crosscoder.analysis.matching import MATCHED, Matching, match_latents
from tl_crosscoder.analysis.matching_nulls import p_value, random_null, rotation_null
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.studies.gate_audit.lexical import Words, same_words, token_ids

FORBIDDEN_TYPES = 5  # of each latent's strongest words, whose tokens the second correlation leaves out


@dataclass(frozen=True)
class Seed:
    """One crosscoder of the target arm: ``gated`` and ``alive`` latents, what the gated ones' words are."""

    crosscoder: Crosscoder
    gated: list[int]
    alive: list[int]
    words: dict[int, Words]

    def rows(self, latents: Sequence[int] | Tensor) -> Float[Tensor, "latent model d_in"]:
        return self.crosscoder.decoder_rows(torch.as_tensor(latents, dtype=torch.long)).detach().cpu()


def stability_table(
    seeds: Sequence[Seed], held_out: PairedActivations, *, n_draws: int = 99, seed: int = 0
) -> pd.DataFrame:
    """Two rows, ``latents`` all and non-lexical: how many of the gated latents each seed finds that another has.

    ``matched`` of ``size`` pairs of latents over all pairs of seeds, their ``share``; ``of_words``: matches of two lexical
    latents with the same words; ``upper_bound``: the share if not one to one; the mean shares of the nulls ``rotation`` and
    ``random`` with ``p_rotation, p_random``; ``correlation, correlation_elsewhere``: median over matched latents, on all
    held-out tokens and away from their words.

    Shares are NaN where no seed pair has a gated latent on both sides.
    """
    rows = []
    for name in ("all", "non-lexical"):
        chosen = [_chosen(s, name) for s in seeds]
        nulls = {"rotation": np.zeros((n_draws, 2)), "random": np.zeros((n_draws, 2))}
        kept, correlations = np.zeros(2, dtype=int), []
        upper, of_words = [], 0
        for (a, b), (ids_a, ids_b) in zip(combinations(seeds, 2), combinations(chosen, 2), strict=True):
            matching = match_latents(a.rows(ids_a), b.rows(ids_b))
            pairs = [
                (ids_a[i], ids_b[j])
                for (i, j), similarity in zip(matching.pairs.tolist(), matching.similarity, strict=True)
                if similarity >= MATCHED
            ]
            of_words += sum(same_words(a.words[i], b.words[j]) for i, j in pairs)
            kept += [len(pairs), matching.size]
            upper.append(matching.upper_bound())
            if not matching.size:
                continue
            nulls["rotation"] += _counts(
                rotation_null(a.rows(ids_a), b.rows(ids_b), n_draws=n_draws, seed=seed)
            )
            live_a, live_b = (torch.tensor(s.alive) for s in (a, b))
            every_a, every_b = (s.rows(range(s.crosscoder.d_sae)) for s in (a, b))
            sizes = (len(ids_a), len(ids_b))
            drawn = random_null(every_a, every_b, live_a, live_b, sizes, n_draws=n_draws, seed=seed)
            nulls["random"] += _counts(drawn)
            correlations += activation_correlations(a, b, pairs, held_out) if pairs else []
        share = kept[0] / kept[1] if kept[1] else np.nan
        row = {
            "latents": name,
            "matched": int(kept[0]),
            "size": int(kept[1]),
            "share": share,
            "of_words": of_words,
        }
        row["upper_bound"] = float(np.nanmean(upper)) if np.isfinite(upper).any() else np.nan
        for null, counts in nulls.items():
            shares = (counts[:, 0] / counts[:, 1]).tolist() if kept[1] else [np.nan]
            row[null], row[f"p_{null}"] = float(np.mean(shares)), p_value(share, shares)
        both = np.array(correlations, dtype=float).reshape(-1, 2)
        for column, values in zip(("correlation", "correlation_elsewhere"), both.T, strict=True):
            row[column] = float(np.nanmedian(values)) if np.isfinite(values).any() else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _chosen(seed: Seed, name: str) -> list[int]:
    return seed.gated if name == "all" else [j for j in seed.gated if not seed.words[j].lexical]


def _counts(null: Sequence[Matching]) -> np.ndarray:
    return np.array([[matching.matched(), matching.size] for matching in null], dtype=float)


def activation_correlations(
    a: Seed, b: Seed, pairs: Sequence[tuple[int, int]], store: PairedActivations
) -> list[tuple[float, float]]:
    """For each pair of latents the correlation of their activations, on all tokens and away from their strongest words."""
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    n_ids = int(store.corpus.ids.max()) + 1
    forbidden = np.zeros((n_ids, len(pairs)), dtype=bool)
    for column, (i, j) in enumerate(pairs):
        for words in (a.words[i], b.words[j]):
            forbidden[words.ids[:FORBIDDEN_TYPES], column] = True
    sums = np.zeros((2, 6, len(pairs)))  # everywhere, elsewhere; n, Σf, Σg, Σff, Σgg, Σfg
    for part in store.located(2048):
        f, g = (_acts(s.crosscoder, part.x, ids) for s, ids in ((a, left), (b, right)))
        ids = token_ids(store.corpus, part.sequence.numpy(), part.position.numpy())
        for place, weight in enumerate((np.ones_like(forbidden[ids]), ~forbidden[ids])):
            sums[place] += [(weight * v).sum(0) for v in (1.0, f, g, f * f, g * g, f * g)]
    n, sf, sg, ff, gg, fg = np.moveaxis(sums, 1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (n * fg - sf * sg) / np.sqrt((n * ff - sf**2) * (n * gg - sg**2))
    return [(float(x), float(y)) for x, y in np.where(np.isfinite(r), r, np.nan).T]


def _acts(crosscoder: Crosscoder, x: Tensor, latents: Sequence[int]) -> np.ndarray:
    """The activations of these latents alone (some may be asked for twice), [batch, latent] in float64."""
    with evaluating(crosscoder):
        codes = crosscoder.encode_sparse(x.to(crosscoder.W_dec))
    ids = sorted(set(latents))
    column = torch.full((crosscoder.d_sae,), -1, device=codes.latents.device)
    column[ids] = torch.arange(len(ids), device=column.device)
    place = column[codes.latents]
    here = place >= 0
    acts = torch.zeros(len(codes), len(ids), dtype=torch.float64, device=column.device)
    acts[codes.tokens()[here], place[here]] = codes.values[here].double()
    return acts[:, column[list(latents)]].cpu().numpy()
