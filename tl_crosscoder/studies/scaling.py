"""Are the latents that only one model's decoder writes really absent from the other model?

Latent Scaling (:class:`~tl_crosscoder.analysis.latent_scaling.LatentScaling`) measures how much of each latent the
other model has, in what is left over by the reconstruction and in the reconstruction itself.  Here its figures are
filtered, and held against two references: latents that both models share (what presence looks like), and
directions that have nothing to do with the latent (what the ratios are by chance).

Source: Minder et al. 2025, arXiv:2504.02922, Latent Scaling; the filters and the reference are those of the
authors' code, the controls' table and the intervals are ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from tl_crosscoder.analysis.base import run
from tl_crosscoder.analysis.decoder_norms import DecoderNorms, classify
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_scaling import TARGETS, LatentScaling
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.scaling import scaling_figure
from tl_crosscoder.studies.progress import TrackedBatches
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.studies.scaling_ratios import control_row, filtered, target_row

CALLED = {"tuned": ("tuned_only",), "base": ("base_only",), "either": ("tuned_only", "base_only")}
LEAST_REFERENCE = 100  # shared latents drawn, however few latents are called
OF_ALL = [f"beta_{target}_{side}" for target in ("error", "recon") for side in ("base", "tuned")]


@dataclass(frozen=True)
class ScalingResult(StudyResult):
    """``table``: one row for each target of Latent Scaling; ``latents``: one for each live latent; ``controls``.

    Columns of ``table``: the median ratio of the ``called`` and of the ``shared`` latents, the range ``shared_low,
    shared_high`` that holds the middle 95 % of the shared ones, the share ``inside`` of the called ones that lies
    in it (with a 95 % Wilson interval), and how ``delta_norm`` goes with the ratio over all kept latents
    (``pearson``, ``pearson_low, pearson_high``, ``spearman``) and over the called ones (``pearson_called``).

    ``latents``: ratios ``nu_*`` (the other model's beta over the probed model's, so near 0: only the probed model has it;
    with the tuned probe base / tuned as everywhere), ``probed``, ``dropped`` (why it was filtered out, or ""),
    ``rank_sum`` (low: specific), ``specific`` (passes both gates), ``called``, ``reference``.

    ``controls``: the called latents' activations with directions that are not theirs.  ``counts``: how many there were."""

    key: ClassVar = "scaling"
    title: ClassVar = "Are they absent from the other model?"
    text: ClassVar = (
        "Latent Scaling fits each latent's direction, where it fires, to what either model's reconstruction leaves over and to "
        "the reconstruction. Near 0: the other model has none of it. Near 1: as much as the model that is said to own it."
    )
    notes: ClassVar = (
        "Inside: the share of the called latents that the middle 95 % of shared latents cannot be told from. "
        "Gates: ν of the error below .2 and of the reconstruction below .5.",
    )
    index: ClassVar = ("target",)

    table: pd.DataFrame
    latents: pd.DataFrame
    controls: pd.DataFrame
    counts: dict[str, Any]

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        n, rows = self.counts, self.table.set_index("target")
        if not n["called_kept"]:
            return f"None of {n['called']:,} {n['called_as']} has usable ratios, so Latent Scaling says nothing of them."
        text = f"Of {n['called_kept']:,} {n['called_as']} with usable ratios, {n['called_specific']:,} pass both gates"
        if len(self.controls):
            chance = self.controls["specific"].max()
            text += f" (with directions that are not theirs {chance:.0%} do)" if np.isfinite(chance) else ""
        for target, words in (("recon", "reconstruction"), ("error", "error")):
            row = rows.loc[target]
            if np.isfinite(row["inside"]):
                span = f"{row['inside_low']:.0%} to {row['inside_high']:.0%}"
                text += f"; by ν of the {words} {row['inside']:.0%} ({span}) look like shared latents"
        known = {w: rows.loc[t, "pearson"] for t, w in (("recon", "reconstruction"), ("error", "error"))}
        if all(np.isfinite(list(known.values()))):
            told = " and ".join(f"{r:.2f} with that of the {w}" for w, r in known.items())
            text += f". Δnorm correlates {told} over {n['kept']:,} latents"
        if n["dropped"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in n["dropped"].items())
            text += f". Of {n['alive']:,} live latents {n['alive'] - n['kept']:,} have no usable ratios ({reasons})"
        return text + "."

    def plot(self) -> Drawing:
        """ν of the error against ν of the reconstruction, and the distributions of both beside the shared latents'."""
        return scaling_figure(self.latents, self.table)


def latent_scaling_study(
    crosscoder: Crosscoder,
    batches: Any,
    *,
    probe: Literal["tuned", "base", "either"] = "tuned",
    calls: Sequence[int] | None = None,
    least: int = 100,
    n_top: int = 30,
    seed: int = 42,
    progress: bool = True,
) -> ScalingResult:
    """What Latent Scaling says of the latents called tuned-only, in one pass over the activations.

    ``batches``: a store, or an iterable of raw ``[batch model d_in]`` tensors.  ``probe``: whose latents are asked about
    (``"either"``: each latent along its longer decoder).  ``calls``: the latents in question; by default those
    that the decoder norms call exclusive to the probed model, and where there are none the ``n_top`` that lean to it most.

    Filters, in this order: fired on fewer than ``least`` tokens; a ratio undefined; the probed model's own beta
    not above 0; a ratio outside -.1 and 2.  The reference is a seeded sample of latents of class ``shared``, as many
    as there are calls but at least 100 where there are so many; with fewer than 20 its range is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    own = LatentScaling(crosscoder, probe)
    norms, firing = DecoderNorms(crosscoder), Firing(crosscoder)
    others = {
        name: LatentScaling(crosscoder, probe, directions)
        for name, directions in _directions(crosscoder, own.probed(), generator).items()
    }
    run(
        crosscoder,
        TrackedBatches(batches, "scaling", progress),
        [own, norms, firing, *others.values()],
    )
    numbers = {
        "delta_norm": norms.columns()["delta_norm"],
        "n_fired": firing.count,
        "probed": own.probed(),
    }
    frame = _frame(numbers | own.columns())
    frame["class"] = classify(frame["delta_norm"], frame["n_fired"])
    frame["probed"] = np.where(frame["probed"] > 0, "tuned", "base")
    frame = filtered(frame, least)
    chosen, called_as = _called(frame, probe, calls, n_top)
    frame["called"] = frame.index.isin(chosen)
    frame["reference"] = _reference(frame, int(frame["called"].sum()), seed)
    alive: Any = frame[frame["n_fired"] > 0]
    controls = [
        {"directions": name, **control_row(_frame(numbers | other.columns()), frame["called"], least)}
        for name, other in others.items()
    ]
    columns = ["class", "delta_norm", "n_fired", "probed", *OF_ALL, *map("nu_{}".format, TARGETS)]
    columns += ["dropped", "rank_sum", "specific", "called", "reference"]
    return ScalingResult(
        pd.DataFrame([target_row(alive, target) for target in TARGETS]),
        alive[columns].reset_index(),
        pd.DataFrame(controls),
        _counts(alive, probe, called_as),
    )


def _frame(columns: dict[str, torch.Tensor]) -> Any:
    frame = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    return frame.rename_axis("latent")


def _directions(
    crosscoder: Crosscoder, probed: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Probes that have nothing to do with the latents: random ones, and other latents', as long as their own."""
    rows = crosscoder.decoder_rows().detach()
    own = rows[torch.arange(len(rows)), probed]
    order = torch.randperm(len(own), generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one cycle: nobody gets its own
    noise = torch.randn(own.shape, generator=generator).to(own)
    lengths = own.norm(dim=1, keepdim=True)
    drawn = {"random": noise, "other latents'": own[other.to(own.device)]}
    return {name: torch.nn.functional.normalize(d, dim=1) * lengths for name, d in drawn.items()}


def _called(frame: Any, probe: str, calls: Sequence[int] | None, n_top: int) -> tuple[list[int], str]:
    """The latents in question, and what they are called."""
    if calls is not None:
        if unknown := [j for j in calls if j not in frame.index]:
            raise IndexError(f"latents {unknown[:5]} are not among 0..{len(frame) - 1}.")
        return [int(j) for j in calls], "chosen latents"
    names = CALLED[probe]
    called = frame.index[frame["class"].isin(names)].tolist()
    words = " or ".join(name.replace("_", "-") for name in names)
    if called:
        return called, f"{words} latents"
    lean = {
        "tuned": frame["delta_norm"],
        "base": -frame["delta_norm"],
        "either": (frame["delta_norm"] - 0.5).abs(),
    }[probe]
    usable = lean[frame["dropped"] == ""].sort_values(ascending=False, kind="stable").index[:n_top]
    where = "one model" if probe == "either" else f"the {probe} model"
    return usable.tolist(), f"latents that lean to {where} most (none is {words} by its norms)"


def _reference(frame: Any, n_calls: int, seed: int) -> np.ndarray:
    free = frame.index[(frame["class"] == "shared") & (frame["dropped"] == "") & ~frame["called"]].to_numpy()
    n = min(len(free), max(n_calls, LEAST_REFERENCE))
    return frame.index.isin(np.random.default_rng(seed).choice(free, n, replace=False))


def _counts(alive: Any, probe: str, called_as: str) -> dict[str, Any]:
    kept, called = alive["dropped"] == "", alive["called"]
    return {
        "probe": probe,
        "called_as": called_as,
        "alive": len(alive),
        "kept": int(kept.sum()),
        "dropped": {str(k): int(v) for k, v in alive["dropped"].value_counts().items() if k},
        "called": int(called.sum()),
        "called_kept": int((called & kept).sum()),
        "called_specific": int((called & alive["specific"]).sum()),
        "specific": int(alive["specific"].sum()),
    }
