"""Pairs of activations whose difference is known, so that a diffing method can be marked right or wrong."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.difference import tuned_minus_base
from tl_crosscoder.types import BASE, TUNED

if TYPE_CHECKING:
    import pandas as pd

#: A call of "tuned-only" is right where less than this share of the concept is present in base.
TRUE_BASE_PRESENCE = 0.05


class SyntheticBatch(NamedTuple):
    """Activations, and how strongly each concept is present in each model."""

    x: Float[Tensor, "batch model d_in"]
    presence: Float[Tensor, "batch model concept"]


@dataclass(frozen=True)
class Score:
    """How right a set of tuned-only calls is.

    ``precision``: share of the called latents whose concept is absent from base (NaN without calls).  ``recall``: share of the
    planted tuned-only concepts with such a latent.  ``calls``: called latents by the kind of their concept.
    """

    precision: float
    recall: float
    calls: dict[str, int]


@dataclass(frozen=True)
class SyntheticPair:
    """Sparse concepts on unit directions shared by both models: ``x^m = Σ_c presence^m_c · u_c + noise``.

    ========== ================================= =========================================================================
    kind       strength in base, in tuned        what it tests
    ========== ================================= =========================================================================
    shared     1, 1
    weak       U[.25, .40], 1                    shrinkage: weaker in base, not absent
    base       1, 0                              exclusive
    tuned      0, 1                              exclusive: the calls that should be made
    decoupled  (1, 1) or (0, 1) or (1, 0)        three mutually exclusive contexts on one direction: shared, but not always
    ========== ================================= =========================================================================

    Each concept is on with probability ``p`` a token (a decoupled one: ``p`` in both, .01 in either alone; a tuned-only one:
    ``p_tuned`` where given), with magnitude U[.5, 1.5] (decoupled U[.9, 1.1], or U[.5, 1.5] where ``wide``).  ``mode``: "pair";
    "identity": tuned is base, bit for bit; "disjoint": tuned is base on other tokens.

    Kinds after Minder et al. 2025, arXiv:2504.02922 (Complete Shrinkage, Latent Decoupling).
    """

    d_in: int = 64
    n_shared: int = 64
    n_weak: int = 16
    n_base: int = 12
    n_tuned: int = 12
    n_decoupled: int = 12
    mode: Literal["pair", "identity", "disjoint"] = "pair"
    wide: bool = False
    p: float = 0.03
    noise: float = 0.03
    seed: int = 0
    p_tuned: float | None = None

    def __post_init__(self):
        if self.mode not in ("pair", "identity", "disjoint"):
            raise ValueError(f"mode is 'pair', 'identity' or 'disjoint', got {self.mode!r}")

    @property
    def kinds(self) -> list[str]:
        """The kind of each concept."""
        counts = {"shared": self.n_shared, "weak": self.n_weak, "base": self.n_base, "tuned": self.n_tuned}
        return [kind for kind, n in {**counts, "decoupled": self.n_decoupled}.items() for _ in range(n)]

    @cached_property
    def directions(self) -> Float[Tensor, "concept d_in"]:
        """Unit directions, the same in both models."""
        return torch.nn.functional.normalize(
            torch.randn(len(self.kinds), self.d_in, generator=self._generator(0), device="cpu"), dim=1
        )

    @cached_property
    def gains(self) -> Float[Tensor, "concept model"]:
        """Strength in base and tuned; 1, 1 for decoupled concepts, whose strength depends on the context."""
        gains = torch.ones(len(self.kinds), 2, device="cpu")
        weak = torch.empty(len(self.kinds), device="cpu").uniform_(0.25, 0.40, generator=self._generator(1))
        for c, kind in enumerate(self.kinds):
            gains[c, BASE] = {"weak": weak[c].item(), "tuned": 0.0}.get(kind, 1.0)
            gains[c, TUNED] = 0.0 if kind == "base" else 1.0
        return gains

    def sample(self, n: int, seed: int = 0) -> SyntheticBatch:
        """``n`` tokens; the same seed gives the same tokens."""
        return self._draw(n, torch.Generator("cpu").manual_seed(seed))

    def batches(
        self, batch_size: int, seed: int = 0, n: int | None = None
    ) -> Iterator[Float[Tensor, "batch model d_in"]]:
        """``n`` batches of fresh activations (None: without end)."""
        generator = torch.Generator("cpu").manual_seed(seed)
        while n is None or n > 0:
            yield self._draw(batch_size, generator).x
            n = None if n is None else n - 1

    def label(self, crosscoder: Crosscoder, n: int = 20_000, seed: int = 1) -> "pd.DataFrame":
        """What each learned latent is about in eval mode, known from the planted truth; one row a latent.

        ``concept`` and ``kind``: of the concept whose strength correlates best with the latent (``correlation``).
        ``base_presence``: Σ f·c_base / Σ f·c_tuned, how much of the concept is there in base where the latent fires.
        Latents that do not fire have kind "dead".
        """
        import pandas as pd

        batch = self.sample(n, seed)
        f = _codes(crosscoder, batch.x).double()
        presence = batch.presence.double()
        correlation, concept = _correlations(f, presence.amax(1)).max(1)
        held = torch.stack([f.T @ presence[:, m] for m in (BASE, TUNED)])[
            :, torch.arange(f.shape[1]), concept
        ]
        kinds = [
            self.kinds[c] if alive else "dead"
            for c, alive in zip(concept.tolist(), f.any(0).tolist(), strict=True)
        ]
        return pd.DataFrame(
            {
                "concept": concept.numpy(),
                "kind": kinds,
                "correlation": correlation.numpy(),
                "base_presence": (held[BASE] / held[TUNED]).numpy(),
            }
        ).rename_axis("latent")

    def score(self, crosscoder: Crosscoder, called: Bool[Tensor, "d_sae"]) -> Score:
        """Mark the latents that were ``called`` tuned-only."""
        return self.mark(self.label(crosscoder), called)

    def mark(self, labels: "pd.DataFrame", called: Bool[Tensor, "d_sae"]) -> Score:
        """As ``score``, given the ``label`` of every latent: for several sets of calls on one crosscoder."""
        labels = labels.loc[called.cpu().numpy()]
        right = labels[labels["base_presence"] < TRUE_BASE_PRESENCE]
        planted = {c for c, kind in enumerate(self.kinds) if kind == "tuned"}
        return Score(
            precision=len(right) / len(labels) if len(labels) else float("nan"),
            recall=len(planted & set(right["concept"])) / len(planted) if planted else float("nan"),
            calls=dict(Counter(labels["kind"].tolist())),
        )

    def recovery(self, crosscoder: Crosscoder, n: int = 20_000, seed: int = 1) -> "pd.DataFrame":
        """How well each concept is one latent's in eval mode; one row a concept.

        ``latent``: each concept's own, so matched that the sum of correlations is largest, at most one concept a latent (-1 where
        there are fewer latents).  ``correlation``: of the latent with the concept's strength.  ``frequency``: of the concept.
        Decoupled concepts are left out: no single latent has their three contexts right.
        """
        import pandas as pd
        from scipy.optimize import linear_sum_assignment

        batch = self.sample(n, seed)
        kinds = self.kinds[: len(self.kinds) - self.n_decoupled]
        strength = batch.presence.double().amax(1)[:, : len(kinds)]
        correlation = _correlations(_codes(crosscoder, batch.x).double(), strength).numpy()
        latents, concepts = linear_sum_assignment(correlation, maximize=True)
        table = pd.DataFrame(
            {"kind": kinds, "latent": -1, "correlation": 0.0, "frequency": (strength > 0).double().mean(0)}
        ).rename_axis("concept")
        table.loc[concepts, "latent"] = latents
        table.loc[concepts, "correlation"] = correlation[latents, concepts]
        return table

    def _draw(self, n: int, generator: torch.Generator) -> SyntheticBatch:
        presence = self._presence(n, generator)
        if self.mode == "disjoint":
            presence[:, TUNED] = self._presence(n, generator)[:, BASE]
        x = presence @ self.directions
        x += self.noise * torch.randn(x.shape, generator=generator, device="cpu")
        if self.mode == "identity":
            presence[:, TUNED], x[:, TUNED] = presence[:, BASE], x[:, BASE]
        return SyntheticBatch(x, presence)

    def _presence(self, n: int, generator: torch.Generator) -> Float[Tensor, "batch model concept"]:
        n_plain = len(self.kinds) - self.n_decoupled
        u = torch.rand(n, len(self.kinds), generator=generator, device="cpu")
        low = torch.full((len(self.kinds),), 0.5, device="cpu")
        low[n_plain:] = 0.5 if self.wide else 0.9
        magnitude = low + 2 * (1 - low) * torch.rand(u.shape, generator=generator, device="cpu")
        p = torch.tensor([self._probability(kind) for kind in self.kinds], device="cpu")
        plain = (u < p)[:, None] * self.gains.T
        both = u[:, n_plain:] < self.p
        tuned = ~both & (u[:, n_plain:] < self.p + 0.01)
        base = ~both & ~tuned & (u[:, n_plain:] < self.p + 0.02)
        plain[:, BASE, n_plain:] = (both | base).float()
        plain[:, TUNED, n_plain:] = (both | tuned).float()
        return plain * magnitude[:, None]

    def _probability(self, kind: str) -> float:
        return self.p_tuned if kind == "tuned" and self.p_tuned is not None else self.p

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(1_000_003 * (self.seed + 1) + stream)


@torch.no_grad()
def _codes(crosscoder: Crosscoder, x: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "batch d_sae"]:
    """Codes in eval mode, on the CPU; the mode is put back.  A dictionary of one model reads the difference."""
    training = crosscoder.training
    x = tuned_minus_base(x) if crosscoder.n_models == 1 else x
    try:
        return crosscoder.eval().encode(x.to(crosscoder.W_dec.device)).cpu()
    finally:
        crosscoder.train(training)


def _correlations(
    a: Float[Tensor, "batch d_sae"], b: Float[Tensor, "batch concept"]
) -> Float[Tensor, "d_sae concept"]:
    """Pearson correlations; -1 where one side is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    return torch.nan_to_num((a.T @ b) / (a.norm(dim=0)[:, None] * b.norm(dim=0)), nan=-1.0)
