"""How well descriptions tell where latents fire."""

from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.figures.drawing import DARK, FAINT, INK, ORANGE, SOFT, Drawing, NotDrawn
from tl_crosscoder.figures.text import visible

COLOURS = {"random": ORANGE, "similar": SOFT, "shuffled": FAINT}


def detection_bars(groups: pd.DataFrame, bins: pd.DataFrame) -> Drawing:
    """Left: each group's mean score.  Right: mean accuracy against random silent passages over the bins of activation.

    Columns of ``groups``: group, against, mean, low, high; of ``bins``: group, bin, against, accuracy.  The line at .5 is a coin.
    """
    if groups.empty or not np.isfinite(groups["mean"].to_numpy(float)).any():
        raise NotDrawn("no latent was scored")
    names, kinds = list(dict.fromkeys(groups["group"])), list(dict.fromkeys(groups["against"]))
    shares = list(dict.fromkeys(bins["bin"]))
    found = {(row["group"], row["against"]): row for row in groups.to_dict("records")}
    random = [
        row
        for row in bins.to_dict("records")
        if row["against"] == "random" and row["accuracy"] == row["accuracy"]
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for k, kind in enumerate(kinds):
            mean, low, high = (
                np.array([found[name, kind][part] for name in names], float)
                for part in ("mean", "low", "high")
            )
            x = np.arange(len(names)) + (k - (len(kinds) - 1) / 2) * 0.26
            left.bar(x, mean, width=0.24, color=COLOURS.get(kind, INK), linewidth=0, label=kind)
            left.vlines(x, low, high, color=DARK, linewidth=1)
        left.set_xticks(range(len(names)), [visible(name) for name in names])
        for shade, name in zip([ORANGE, INK, SOFT, FAINT] * len(names), names, strict=False):
            mine = [
                [r["accuracy"] for r in random if (r["group"], r["bin"]) == (name, share)] for share in shares
            ]
            mean = [sum(values) / len(values) if values else np.nan for values in mine]
            right.plot(range(len(shares)), mean, color=shade, marker="o", markersize=3, label=visible(name))
        right.set_xticks(range(len(shares)), shares)
        for axes in (left, right):
            axes.axhline(0.5, color=SOFT, linewidth=0.6)
            axes.set_ylim(0, 1.02)
            axes.legend(fontsize=7.5, handlelength=1)
        left.set_ylabel("detection score")
        right.set_xlabel("activation, of the latent's largest")

    return Drawing(draw, (7.5, 2.7))
