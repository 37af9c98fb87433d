"""How to learn and rank."""

from dataclasses import dataclass
from typing import Any

#: columns of the latent table that say, high first, how much a latent has to do with the change
RANKINGS = ("rank_score", "difference_peak", "difference_share", "delta_norm")


@dataclass(frozen=True)
class DiffConfig:
    """How to learn and rank.  ``ranking`` is a column of the latent table, highest first."""

    #: A published training (:func:`tl_crosscoder.recipe`) in place of the plain BatchTopK one; it decides all but the sizes.
    recipe: str | None = None
    d_sae: int = 4096
    #: Active latents a token; None: 32, or the recipe's.
    k: int | None = None
    steps: int = 2000
    #: Tokens a step.
    batch_size: int = 1024
    #: Adam's largest step; None: 1e-3, or the recipe's.
    lr: float | None = None
    #: Length of each model's decoder rows at the start; a recipe has its own.
    init_norm: float = 0.5
    #: Share of the latents, the first ones, whose directions start alike in both models; None: .8, which finds rare changes better
    #: than 1 (docs/variants.md, docs/narrow.md), or the recipe's.
    init_same: float | None = None
    #: Share of the sequences that the crosscoder never sees; the table and the studies use only these.
    held_out: float = 0.1
    ranking: str = "rank_score"
    #: Sizes of the top sets that the studies try.
    top: tuple[int, ...] = (3, 10, 30)
    #: Tokens of held-out text for the substitution study.
    study_tokens: int = 6000
    seed: int = 0

    def __post_init__(self):
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ValueError(f"k must lie in 1..d_sae={self.d_sae}, got {self.k}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share of the conversations in (0, 1), got {self.held_out}")
        for name in ("steps", "batch_size", "lr", "init_norm", "study_tokens"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.init_same is not None and not 0 <= self.init_same <= 1:
            raise ValueError(f"init_same is a share of the latents in [0, 1], got {self.init_same}")
        if self.init_same is not None and self.recipe is not None:
            raise ValueError(
                f"the recipe {self.recipe!r} decides the start itself: leave init_same={self.init_same} out"
            )
        if self.ranking not in RANKINGS:
            raise ValueError(f"no ranking {self.ranking!r}; known: {', '.join(RANKINGS)}")
        if not self.top or min(self.top) < 1:
            raise ValueError(f"top wants sizes of at least 1, got {self.top}")

    @classmethod
    def of(cls, extra: dict[str, Any]) -> "DiffConfig":
        """The settings that were saved beside a crosscoder; the defaults where it was trained otherwise."""
        known: dict[str, Any] = dict(extra.get("config") or {})
        if "top" in known:
            known["top"] = tuple(known["top"])
        return cls(**known)
