"""What the tuned model gets at the hook: the conditions of the substitution study, and the sets of latents they speak of."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.analysis.table import ranked
from tl_crosscoder.dictionary.codes import Codes
from tl_crosscoder.gates import NU_HIGH, NU_LOW
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.studies.dictionaries import Dictionary, n_active
from tl_crosscoder.studies.predictions import counted_predictions, log_probs
from tl_crosscoder.studies.where import kept_tokens
from tl_crosscoder.types import BASE, TUNED

DELTA_NORM_ABOVE, NU_ACT_BELOW = 0.7, (0.6, 0.3, 0.1)


class Reading:
    """One batch of text in both models; every part is computed when it is first asked for."""

    def __init__(
        self, dictionary: Dictionary, pair: ModelPair, batch: TokenBatch, drop: Drop, published: bool = False
    ):
        self.dictionary, self.pair, self.drop, self.published = dictionary, pair, drop, published
        self.device = dictionary.change.device
        self.batch = batch.to(self.device)
        self._of_others: dict[int, tuple[Codes, Codes | None]] = {}

    @cached_property
    def acts(self) -> Float[Tensor, "seq pos model d_in"]:
        return self.pair.capture(self.batch).to(self.device)

    @cached_property
    def where(self) -> Bool[Tensor, "seq pos"]:
        """The tokens that may be replaced."""
        return kept_tokens(self.batch, self.acts, self.drop)

    @cached_property
    def codes(self) -> tuple[Codes, Codes | None]:
        return self.dictionary.codes(self.acts[self.where])

    def codes_of(self, other: Dictionary) -> tuple[Codes, Codes | None]:
        """Of a dictionary that is compared: no more active latents on this batch than the study's own has."""
        if id(other) not in self._of_others:
            most = n_active(self.codes)
            self._of_others[id(other)] = other.codes(self.acts[self.where], most)
        return self._of_others[id(other)]

    @cached_property
    def counted(self) -> dict[str, Bool[Tensor, "seq pos"]]:
        return counted_predictions(self.batch, self.where, self.published)

    @cached_property
    def tuned(self) -> Float[Tensor, "batch d_vocab"]:
        """The untouched tuned model's log-probabilities where predictions are counted."""
        return log_probs(self.pair.run(self.batch).to(self.device), self.counted["all"])

    @cached_property
    def base(self) -> Float[Tensor, "batch d_vocab"]:
        """The base model's, end to end."""
        return log_probs(self.pair.run(self.batch, side="base").to(self.device), self.counted["all"])

    def at(self, model: int) -> Float[Tensor, "token d_in"]:
        return self.acts[:, :, model][self.where].float()

    def written(
        self, latents: Tensor | None = None, of: Dictionary | None = None, *, additive: bool = False
    ) -> Float[Tensor, "token d_in"]:
        """The change that ``latents`` make (None: all), by the study's own dictionary or another."""
        codes = self.codes if of is None else self.codes_of(of)
        return (of or self.dictionary).written(codes, latents, additive=additive)

    def patched(self, values: Float[Tensor, "token d_in"]) -> Float[Tensor, "batch d_vocab"]:
        """The tuned model's log-probabilities with ``values`` at the tokens in ``where``."""
        acts = self.acts[:, :, TUNED].float().clone()
        acts[self.where] = values
        logits = self.pair.run(self.batch, lambda h, hook=None: acts.to(h))  # noqa: ARG005
        return log_probs(logits.to(self.device), self.counted["all"])


@dataclass(frozen=True)
class Condition:
    """``run`` gives the log-probabilities of a batch; ``latents`` that it puts in, where it is about a set of them."""

    run: Callable[[Reading], Tensor]
    latents: tuple[int, ...] | None = None


def fixed_conditions(template_tokens: bool, every: bool) -> dict[str, Condition]:
    """Those that are not about a set of latents."""

    def template(r: Reading) -> Tensor:
        keep = r.batch.template[r.where][:, None]
        return r.patched(torch.where(keep, r.at(TUNED), r.at(BASE)))

    fixed = {
        "none": Condition(lambda r: r.patched(r.at(BASE))),
        "base": Condition(lambda r: r.base),
        **whole(),
    }
    if template_tokens:
        fixed["template"] = Condition(template)
    if every:
        fixed |= {
            "tuned": Condition(lambda r: r.patched(r.at(TUNED))),
            "bias": Condition(lambda r: r.patched(r.at(BASE) + r.dictionary.bias)),
            "all with bias": Condition(lambda r: r.patched(r.at(BASE) + r.written() + r.dictionary.bias)),
        }
    return fixed


def whole(of: Dictionary | None = None) -> dict[str, Condition]:
    """The whole change that a dictionary (None: the study's own) reads, and what is left without it."""
    return {
        "all": Condition(lambda r: r.patched(r.at(BASE) + r.written(of=of))),
        "error": Condition(lambda r: r.patched(r.at(TUNED) - r.written(of=of))),
    }


def of_latents(
    latents: list[int], d_sae: int, of: Dictionary | None = None, *, additive: bool = False
) -> Condition:
    """Base activations + the set's change ``f_j (d_j^tuned − d_j^base)``; additive: + ``f_j d_j^tuned``, nothing subtracted."""
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[latents] = True

    def run(r: Reading) -> Tensor:
        return r.patched(r.at(BASE) + r.written(mask.to(r.device), of, additive=additive))

    return Condition(run, tuple(sorted(latents)))


def latent_sets(
    table: Any,
    ranking: str,
    *,
    top: tuple[int, ...],
    n_specific: int | None,
    n_random: int,
    seed: int,
    every: bool,
) -> dict[str, list[int]]:
    """Condition -> its latents; ``NAME#0``, ``NAME#1`` ... are draws of one random set.  Empty sets are left out."""
    rng = np.random.default_rng(seed)
    order = ranked(table, ranking)
    alive = table.index[table["n_fired"].to_numpy() > 0]
    others = sorted(set(alive) - set(order[: max(top, default=0)]))
    sets: dict[str, list[int]] = {f"top {n} ranked": order[:n] for n in top}

    def draw(name: str, among: list[int], size: int) -> None:
        for i in range(n_random):
            sets[f"{name}#{i}"] = rng.choice(among, size=min(size, len(among)), replace=False).tolist()

    for n in top:
        draw(f"random {n}", others, n)
    if "delta_norm" in table:
        n_specific = min(n_specific or max(2, len(alive) // 10), len(alive))
        specific = table.loc[ranked(table, "delta_norm")[:n_specific]]
        sets |= _halves("delta_norm", specific.index.tolist()) | _halves("latent scaling", _by_nu(specific))
        if every:
            half = len(specific) // 2
            draw(f"random {half} of the specific", specific.index.tolist(), half)
            draw(f"random {half} of all", alive.tolist(), half)
            live = table.loc[alive]
            high = live.index[live["delta_norm"] > DELTA_NORM_ABOVE]
            sets[f"delta_norm above {DELTA_NORM_ABOVE}"] = high.tolist()
            if "nu_act" in table:
                for bar in NU_ACT_BELOW:
                    sets[f"nu_act below {bar}"] = live.index[live["nu_act"].abs() < bar].tolist()
    return {name: ids for name, ids in sets.items() if len(ids)}


def _by_nu(specific: Any) -> list[int]:
    """Lowest rank(nu_error) + rank(nu_recon) first; ratios undefined or outside -.1 and 2 are left out."""
    nu = specific[["nu_error", "nu_recon"]]
    kept = nu[((nu >= NU_LOW) & (nu <= NU_HIGH)).all(axis=1)]
    return kept.rank().sum(axis=1).sort_values(kind="stable").index.tolist()


def _halves(name: str, order: list[int]) -> dict[str, list[int]]:
    half = len(order) // 2
    return {f"{name} top": order[:half], f"{name} bottom": order[half : 2 * half]} if half else {}
