"""How many latents pass a gate in each arm of its audit."""

from typing import Any

import pandas as pd

from tl_crosscoder.figures.drawing import BLUE, DARK, INK, ORANGE, SOFT, Drawing, NotDrawn

COLOURS = {"target": ORANGE, "identity": BLUE, "noise": SOFT, "disjoint": DARK}


def gate_counts(table: pd.DataFrame, gate: str, threshold: float) -> Drawing:
    """Latents a crosscoder above each threshold (``arm, threshold, mean, low, high``); the dotted line is where the gate stands."""
    if table.empty:
        raise NotDrawn("no arm was counted")

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axvline(threshold, color=INK, linewidth=0.7, linestyle=":")
        for name, rows in table.groupby("arm", sort=False):
            colour = COLOURS.get(str(name), INK)
            x, mean, low, high = (rows[c].to_numpy(float) for c in ("threshold", "mean", "low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, mean, color=colour, marker="o", markersize=3, label=str(name))
        axes.set_yscale("symlog", linthresh=1, linscale=0.4)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(f"{gate} above")
        axes.set_ylabel("latents a crosscoder")
        axes.legend()

    return Drawing(draw, (7.5, 3.0))
