"""The figure of Latent Scaling: the called latents among those that both models share."""

from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.figures.drawing import BLUE, DARK, FAINT, INK, ORANGE, SOFT, Drawing, NotDrawn
from tl_crosscoder.gates import NU_ERROR_GATE, NU_HIGH, NU_LOW, NU_RECON_GATE

MOST = 3000


def scaling_figure(latents: pd.DataFrame, table: pd.DataFrame) -> Drawing:
    """Left: ν of the error against ν of the reconstruction.  Right: how both are distributed, called against shared.

    Columns of ``latents``: nu_error, nu_recon, dropped, called, reference, probed; of ``table``: target, shared_low, shared_high.
    """
    kept: Any = latents[latents["dropped"] == ""] if len(latents) else latents
    if not len(kept):
        raise NotDrawn("no latent has ratios that pass the filters")
    called, shared = kept[kept["called"]], kept[kept["reference"]]
    rest = kept[~kept["called"] & ~kept["reference"]].iloc[:MOST]
    colours = np.where(called["probed"] == "tuned", ORANGE, BLUE)
    ranges = table.set_index("target")

    def draw(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1])
        axes = figure.add_subplot(grid[:, 0])
        gate = {"color": ORANGE, "alpha": 0.1, "linewidth": 0}
        axes.add_patch(Rectangle((NU_LOW, NU_LOW), NU_RECON_GATE - NU_LOW, NU_ERROR_GATE - NU_LOW, **gate))
        dot = {"linewidths": 0, "clip_on": False}
        axes.scatter(rest["nu_recon"], rest["nu_error"], s=5, color=FAINT, label="other", **dot)
        axes.scatter(shared["nu_recon"], shared["nu_error"], s=6, color=SOFT, label="shared, drawn", **dot)
        axes.scatter(called["nu_recon"], called["nu_error"], s=14, color=colours, label="called", **dot)
        axes.axvline(NU_RECON_GATE, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.axhline(NU_ERROR_GATE, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.set_xlim(NU_LOW, NU_HIGH)
        axes.set_ylim(NU_LOW, NU_HIGH)
        axes.set_xlabel("ν of the reconstruction")
        axes.set_ylabel("ν of the error")
        axes.set_title("lower left: only the probed model has it")
        axes.legend(loc="upper right", handletextpad=0.2)
        bins = np.linspace(NU_LOW, NU_HIGH, 43)
        for row, (target, words) in enumerate((("recon", "reconstruction"), ("error", "error"))):
            axes = figure.add_subplot(grid[row, 1])
            name = f"nu_{target}"
            low, high = ranges.loc[target, ["shared_low", "shared_high"]]
            if np.isfinite(low):
                axes.axvspan(low, high, color=SOFT, alpha=0.2, linewidth=0, label="95 % of shared")
            for part, colour, label in ((shared, DARK, "shared"), (called, ORANGE, "called")):
                if len(part):
                    share = np.full(len(part), 100 / len(part))
                    style = {"histtype": "step", "color": colour, "linewidth": 1.2}
                    axes.hist(part[name], bins, weights=share, label=f"{label}, {len(part):,}", **style)
            axes.set_xlim(NU_LOW, NU_HIGH)
            axes.set_title(f"ν of the {words}")
            axes.set_ylabel("%")
            if row == 0:
                axes.legend(loc="upper right", handlelength=1)

    return Drawing(draw, (7.5, 4.0))
