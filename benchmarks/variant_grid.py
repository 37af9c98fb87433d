"""The variants that are compared, and what a study of them has in common.

A variant says how to build a crosscoder that has about ``study.l0`` active latents per token; one whose number of active latents
follows from a penalty also says where to look for the penalty's weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, Delta, Loss, Matryoshka, PreAct, TanhPenalty
from tl_crosscoder.dictionary.losses.price import Price
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK, GroupMax, JumpReLU, ReLU, Sparsity, Split, TopK
from tl_crosscoder.dictionary.synthetic import SyntheticPair

Same = bool | float
CodeNorm = Literal["sum", "l2", "none"]
NONE: dict[str, Any] = {}


class Parts(NamedTuple):
    """What a crosscoder is made of and trained with."""

    sparsity: Sparsity
    losses: list[Loss]
    init: Init = Init(same=False)
    settings: dict[str, Any] = NONE


@dataclass(frozen=True)
class Study:
    """A planted pair, and the training that all variants get; ``l0``: active latents per token that all must have."""

    pair: SyntheticPair
    variants: dict[str, "Variant"]
    l0: float
    d_sae: int = 200
    steps: int = 1200
    batch_size: int = 500
    lr: float = 4e-3
    #: Tokens that the result is judged by.
    n_judged: int = 20_000


@dataclass(frozen=True)
class Variant:
    """``parts(study, weight)``.  ``weight``: where the search for the penalty's weight starts (None: nothing to search).

    ``changes``: fields of the study that this variant has otherwise.
    """

    parts: Callable[[Study, float], Parts]
    weight: float | None = None
    n_models: int = 2
    changes: dict[str, Any] = field(default_factory=dict)

    def build(self, study: Study, weight: float, seed: int) -> tuple[Crosscoder, list[Loss]]:
        parts = self.parts(study, weight)
        crosscoder = Crosscoder(
            study.pair.d_in,
            study.d_sae,
            parts.sparsity,
            n_models=self.n_models,
            init=replace(parts.init, seed=seed),
            **parts.settings,
        )
        return crosscoder, parts.losses


def falling(k: float, study: Study) -> BatchTopK:
    """Six times as many active latents at first, over a tenth of the training."""
    return BatchTopK(k, min(6 * k, study.d_sae // 2), study.steps // 10)


AUXK = AuxK(dead_after_tokens=20_000)


def l1(weight: float, norm: Price = "sum", *, same: Same = False, shared: float = 0.0) -> Variant:
    def parts(study: Study, weight: float) -> Parts:
        del study
        loss = L1(weight, norm, shared=shared, shared_factor=0.15)
        return Parts(ReLU(), [MSE(), loss], Init(0.1, same), {"partition": Partition(shared=shared)})

    return Variant(parts, weight)


def jumprelu(weight: float) -> Variant:
    return Variant(
        lambda _, w: Parts(JumpReLU(0.1, bandwidth=0.5), [MSE(), TanhPenalty(w), PreAct()]), weight
    )


def batch_topk(
    *, same: Same = False, code_norm: CodeNorm = "sum", partition: Partition | None = None, **changes: Any
) -> Variant:
    settings = {"code_norm": code_norm, "partition": partition or Partition()}
    return Variant(
        lambda study, _: Parts(falling(study.l0, study), [MSE(), AUXK], Init(same=same), settings),
        changes=changes,
    )


def decoupled(weight: float) -> Variant:
    """Each model chooses k = L0 / weight latents a token itself; the union of both choices is what is active."""

    def parts(study: Study, weight: float) -> Parts:
        k = round(study.l0 / weight * study.batch_size) / study.batch_size
        return Parts(falling(k, study), [MSE(), AUXK], settings={"code_norm": "decoupled"})

    return Variant(parts, weight)


def topk(k: int) -> Variant:
    return Variant(lambda *_: Parts(TopK(k), [MSE(), AUXK]))


def group_max(k: int) -> Variant:
    return Variant(lambda *_: Parts(GroupMax(k), [MSE(), AUXK]))


def matryoshka(*prefixes: float) -> Variant:
    return Variant(lambda study, _: Parts(falling(study.l0, study), [Matryoshka(prefixes), AUXK]))


def delta(
    weight: float,
    shared: float,
    rest: float,
    *,
    same: Same | None = None,
    encoder: Literal["sum", "mean"] = "sum",
    **changes: Any,
) -> Variant:
    """``shared``: share of the latents; ``rest``: the others' share of the active ones; ``same=None``: on the shared latents."""

    def parts(study: Study, _: float) -> Parts:
        k_rest = round(rest * study.l0, 1)
        sparsity = Split(shared, falling(study.l0 - k_rest, study), falling(k_rest, study))
        init = Init(same=shared if same is None else same)
        return Parts(sparsity, [MSE(), AUXK, Delta(weight, shared)], init, {"encoder": encoder})

    return Variant(parts, changes=changes)


def of_difference(k: float) -> Variant:
    return Variant(lambda study, _: Parts(falling(k, study), [MSE(), AUXK]), n_models=1)


INITS: dict[str, Same] = {"same": True, "same on 80 %": 0.8, "apart": False}

PLANTED = {
    "ReLU, L1 sum": l1(0.9),
    "ReLU, L1 sum, same init": l1(0.9, same=True),
    "ReLU, L1 joint": l1(1.2, "joint"),
    "ReLU, L1 mixed": l1(1.0, "mixed"),
    "JumpReLU": jumprelu(0.008),
    "TopK": topk(5),
    "GroupMax": group_max(5),
    "BatchTopK": batch_topk(),
    "BatchTopK, same init": batch_topk(same=True),
    "BatchTopK, l2 norm": batch_topk(code_norm="l2"),
    "BatchTopK, no norm": batch_topk(code_norm="none"),
    "BatchTopK, decoupled": decoupled(1.2),
    "Matryoshka": matryoshka(0.25, 0.5, 1.0),
    "DSF 20 %, L1": l1(1.0, shared=0.2),
    "DSF 20 %": batch_topk(partition=Partition(shared=0.2)),
    "DFC 5 %": batch_topk(partition=Partition(base=0.05, tuned=0.05)),
    "Delta 0": delta(0.0, 0.5, 0.4),
    "Delta 1": delta(1.0, 0.5, 0.4),
    "Delta 1, same init": delta(1.0, 0.5, 0.4, same=True),
    "Delta 1, mean encoder": delta(1.0, 0.5, 0.4, encoder="mean"),
    "Delta .005, as published": delta(0.005, 0.2, 1 / 3, encoder="mean"),
    "diff-SAE, k 2": of_difference(2),
}
WIDE = (
    "ReLU, L1 sum",
    "ReLU, L1 joint",
    "JumpReLU",
    "TopK",
    "BatchTopK",
    "BatchTopK, no norm",
    "BatchTopK, decoupled",
    "DFC 5 %",
    "Delta 1",
)
LONG = ("ReLU, L1 sum", "JumpReLU", "TopK", "BatchTopK", "Delta 1")

#: Of 4.3 active latents, .3 are not shared.
REST = 0.3 / 4.3
RARE = (
    {f"BatchTopK, {name}": batch_topk(same=same) for name, same in INITS.items()}
    | {
        f"Delta {w:g}, {name}": delta(w, 0.8, REST, same=same)
        for name, same in INITS.items()
        for w in (0.0, 1.0)
    }
    | {f"Delta {w:g}, same on 80 %": delta(w, 0.8, REST) for w in (0.005, 0.05, 0.5)}
    | {f"BatchTopK, apart, d_sae {d_sae}": batch_topk(d_sae=d_sae) for d_sae in (136, 400)}
    | {"BatchTopK, apart, k 6": batch_topk(l0=6.0)}
    | {"Delta 1, same on 80 %, d_sae 400": delta(1.0, 0.8, REST, d_sae=400)}
    | {f"Delta {w:g}, same on 80 %, .9 not shared": delta(w, 0.8, 0.9 / 4.3) for w in (0.0, 1.0)}
    | {f"Delta {w:g}, same on 20 %, 1.4 not shared": delta(w, 0.2, 1.4 / 4.3) for w in (0.005, 1.0)}
    | {
        "ReLU, L1 sum, apart": l1(0.8),
        "JumpReLU, apart": jumprelu(0.015),
        "DFC 5 %, apart": batch_topk(partition=Partition(base=0.05, tuned=0.05)),
        "DSF 80 %, apart": batch_topk(partition=Partition(shared=0.8)),
        "diff-SAE, k .3": of_difference(0.3),
    }
)
RARE_LONG = ("BatchTopK, same", "BatchTopK, apart", "Delta 0, same on 80 %", "Delta 1, same on 80 %")

PLANTED_PAIR = SyntheticPair()
RARE_PAIR = SyntheticPair(n_shared=120, n_weak=0, n_base=0, n_tuned=6, n_decoupled=0, p_tuned=0.004)
RARE_STUDY = Study(RARE_PAIR, RARE, 4.3, steps=2000, batch_size=250, lr=1e-2, n_judged=40_000)


def some(variants: dict[str, Variant], names: tuple[str, ...]) -> dict[str, Variant]:
    return {name: variants[name] for name in names}


STUDIES = {
    "planted": Study(PLANTED_PAIR, PLANTED, 5),
    "wide": Study(replace(PLANTED_PAIR, wide=True), some(PLANTED, WIDE), 5),
    "planted-long": Study(PLANTED_PAIR, some(PLANTED, LONG), 5, steps=3600),
    "rare": RARE_STUDY,
    "rare-long": replace(RARE_STUDY, variants=some(RARE, RARE_LONG), steps=6000),
}
