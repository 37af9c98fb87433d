"""The trainings of the synthetic benchmark: a crosscoder on a pair of activations whose difference is known."""

from dataclasses import dataclass, replace
from typing import Literal

from tl_crosscoder.analysis.marks import marks
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, Loss
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU
from tl_crosscoder.dictionary.synthetic import SyntheticPair
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train


@dataclass(frozen=True)
class Setting:
    """The planted pair and the training that all cells share."""

    pair: SyntheticPair
    d_sae: int
    #: Active latents a token: of a pair, where the magnitudes are wide, and where the two models read other tokens.
    k: int
    k_wide: int
    k_disjoint: int
    l1_weight: float
    steps: int
    batch_size: int
    lr: float
    #: BatchTopK begins with so many active latents, which fall to ``k`` over this share of the training.
    k_start: int
    k_anneal: float
    dead_after_tokens: int
    #: Tokens that a dictionary is judged by.
    n_judged: int = 20_000


FULL = Setting(
    SyntheticPair(),
    d_sae=200,
    k=5,
    k_wide=5,
    k_disjoint=7,
    l1_weight=0.2,
    steps=1500,
    batch_size=500,
    lr=4e-3,
    k_start=30,
    k_anneal=0.1,
    dead_after_tokens=20_000,
)
#: A quarter of the concepts in half the dimensions, for a look in seconds.
FAST = Setting(
    SyntheticPair(d_in=32, n_shared=16, n_weak=6, n_base=5, n_tuned=6, n_decoupled=5, p=0.05),
    d_sae=64,
    k=2,
    k_wide=3,
    k_disjoint=2,
    l1_weight=0.15,
    steps=400,
    batch_size=512,
    lr=1e-2,
    k_start=10,
    k_anneal=0.2,
    dead_after_tokens=5_000,
    n_judged=10_000,
)


@dataclass(frozen=True)
class Cell:
    """One crosscoder: how it is made sparse, and on which kind of pair it is trained."""

    sparsity: Literal["L1", "BatchTopK"]
    pair: Literal["narrow", "wide", "identity", "disjoint"]

    @property
    def name(self) -> str:
        return self.sparsity if self.pair == "narrow" else f"{self.sparsity}, {self.pair}"


KINDS = ("shared", "weak", "base", "tuned", "decoupled")
CELLS = (
    Cell("L1", "narrow"),
    Cell("BatchTopK", "narrow"),
    Cell("L1", "wide"),
    Cell("BatchTopK", "wide"),
    Cell("L1", "identity"),
    Cell("BatchTopK", "identity"),
    Cell("BatchTopK", "disjoint"),
)


def planted(setting: Setting, cell: Cell, seed: int) -> SyntheticPair:
    """The pair of a cell; each seed has concepts of its own."""
    pair = replace(setting.pair, seed=seed)
    if cell.pair == "narrow":
        return pair
    return replace(pair, wide=True) if cell.pair == "wide" else replace(pair, mode=cell.pair)


def trained(setting: Setting, cell: Cell, seed: int) -> Crosscoder:
    """The crosscoder of a cell.  The two models start from independent directions: where they agree, they learned to."""
    pair, (sparsity, losses, norm) = planted(setting, cell, seed), _parts(setting, cell)
    crosscoder = Crosscoder(pair.d_in, setting.d_sae, sparsity, init=Init(norm=norm, same=False, seed=seed))
    config = TrainConfig(steps=setting.steps, lr=setting.lr, progress=False)
    train(crosscoder, pair.batches(setting.batch_size, seed), losses, config)
    return crosscoder


def _parts(setting: Setting, cell: Cell) -> tuple[ReLU | BatchTopK, list[Loss], float]:
    if cell.sparsity == "L1":
        return ReLU(), [MSE(), L1(setting.l1_weight)], 0.1
    k = {"wide": setting.k_wide, "disjoint": setting.k_disjoint}.get(cell.pair, setting.k)
    falling = BatchTopK(k, k_max=setting.k_start, k_anneal_steps=round(setting.k_anneal * setting.steps))
    return falling, [MSE(), AuxK(dead_after_tokens=setting.dead_after_tokens)], 1.0


def cell_marks(setting: Setting, cell: Cell, seed: int) -> dict[str, float | None]:
    """The marks of one training, each a number; ``{gate}_{kind}``: the calls of concepts of that kind."""
    found = marks(planted(setting, cell, seed), trained(setting, cell, seed), setting.n_judged)
    calls = {gate: found.pop(f"{gate}_calls") for gate in ("norm", "gated", "nu")}
    counts = {f"{gate}_{kind}": calls[gate].get(kind, 0) for gate in calls for kind in KINDS}
    return found | counts
