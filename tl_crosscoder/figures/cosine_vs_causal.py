"""Decoders that point the same way, and what they do: one dot a latent."""

from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.figures.columns import class_key
from tl_crosscoder.figures.drawing import DARK, INK, Drawing, NotDrawn
from tl_crosscoder.figures.plots import CLASS_COLOURS
from tl_crosscoder.figures.text import visible


def cosine_vs_causal(table: pd.DataFrame, alike: float, different: float) -> Drawing:
    """Causal equivalence (``ce, ce_low, ce_high``) against the decoder ``cosine``, by ``class``; shaded: alike but different.

    The dotted line is the median of ``mismatched``: the CE of latents that have nothing to do with each other.
    """
    rows = table.query("ce == ce and cosine == cosine")  # no NaN
    if rows.empty:
        raise NotDrawn("no latent has both a decoder cosine and a causal equivalence")
    others = rows["mismatched"].to_numpy(float)
    null = float(np.median(others[np.isfinite(others)])) if np.isfinite(others).any() else np.nan

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        left = min(0.0, float(rows["cosine"].to_numpy(float).min())) - 0.05
        axes.fill_between([alike, 1], -1, different, color=INK, alpha=0.08, linewidth=0)
        for name, here in rows.groupby("class"):
            colour = CLASS_COLOURS.get(class_key(name), DARK)
            axes.vlines(
                here["cosine"], here["ce_low"], here["ce_high"], color=colour, linewidth=0.6, alpha=0.5
            )
            dots = {"s": 12, "color": colour, "linewidths": 0}
            axes.scatter(here["cosine"], here["ce"], label=f"{visible(str(name))}: {len(here)}", **dots)
        if np.isfinite(null):
            axes.axhline(null, color=INK, linewidth=0.8, linestyle=":")
            axes.text(left + 0.02, null, "median of mismatched latents", va="bottom", fontsize=7.5)
        axes.set_xlim(left, 1.02)
        axes.set_ylim(min(-0.1, rows["ce_low"].min()), 1.03)
        axes.set_xlabel("cosine of the two decoder directions")
        axes.set_ylabel("causal equivalence")
        axes.legend(loc="lower left", handlelength=0.8)

    return Drawing(draw, (7.5, 3.6))
