"""The figure of the synthetic benchmark: precision of the calls, what the wrong ones are, and the two controls."""

from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.figures.drawing import BLUE, DARK, FAINT, ORANGE, SOFT, Drawing, NotDrawn

PLAIN = ("L1", "L1, wide", "BatchTopK", "BatchTopK, wide")
CONTROLS = ("L1, identity", "BatchTopK, identity", "BatchTopK, disjoint")
KINDS = {"weak": ORANGE, "decoupled": BLUE, "shared": SOFT, "base": DARK}


def claims_figure(cells: pd.DataFrame) -> Drawing:
    """Bars are means over seeds, dots the seeds.  Columns: cell and the marks of each training."""
    if cells.empty:
        raise NotDrawn("there was no training")
    groups: Any = {name: rows for name, rows in cells.groupby("cell", sort=False)}

    def values(cell: str, mark: str) -> np.ndarray:
        here = np.asarray(groups[cell][mark], dtype=float)
        return here[np.isfinite(here)]

    def bars(axes: Any, places: np.ndarray, names: tuple[str, ...], mark: str, **style: Any) -> None:
        for place, name in zip(places, names, strict=True):
            here = values(name, mark)
            if len(here):
                axes.barh(place, here.mean(), linewidth=0, **style)
                axes.plot(here, np.full(len(here), place), ".", color=DARK, markersize=3.5, clip_on=False)
            style.pop("label", None)

    def draw(figure: Any) -> None:
        precision, wrong, controls = figure.subplots(1, 3, width_ratios=[3, 3, 2])
        places = np.arange(len(PLAIN))
        bars(precision, places - 0.2, PLAIN, "norm_precision", height=0.36, color=FAINT, label="Δnorm")
        bars(precision, places + 0.2, PLAIN, "gated_precision", height=0.36, color=ORANGE, label="and both ν")
        precision.set_xlim(0, 1)
        precision.set_title("precision of tuned-only calls")
        start = np.zeros(len(PLAIN))
        for kind, colour in KINDS.items():
            mean = np.array([values(name, f"norm_{kind}").mean() for name in PLAIN])
            wrong.barh(places, mean, left=start, height=0.6, color=colour, linewidth=0, label=kind)
            start += mean
        wrong.set_title("calls of other concepts, by Δnorm")
        wrong.set_xlabel("latents a dictionary")
        bars(controls, np.arange(len(CONTROLS)), CONTROLS, "exclusive", height=0.6, color=SOFT)
        controls.set_xlim(0, 1)
        controls.set_title("exclusive latents")
        controls.set_xlabel("share of the living")
        for axes, names in ((precision, PLAIN), (wrong, PLAIN), (controls, CONTROLS)):
            axes.set_yticks(np.arange(len(names)), [name.replace(", ", "\n") for name in names])
            axes.invert_yaxis()
            axes.tick_params(axis="y", length=0)
        wrong.set_yticks(places, [""] * len(PLAIN))
        precision.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, handlelength=1)
        wrong.legend(loc="lower right", handlelength=1, fontsize=7.5)

    return Drawing(draw, (7.5, 3.0))
