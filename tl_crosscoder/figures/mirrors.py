"""The figure of mirror pairs: how alike they are and how apart they fire, and the tokens by both latents' strength."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from tl_crosscoder.figures.drawing import DARK, FAINT, ORANGE, Drawing, NotDrawn

BIN_NAMES = ("0", "to .1", "to .4", "to .7", "to 1")
MOST = 3000


def mirror_figure(
    table: pd.DataFrame, random: pd.DataFrame, histograms: Int[np.ndarray, "pair 5 5"]
) -> Drawing:
    """Left: divergence of the pairs against their cosine, random pairs beside them.  Right: all pairs' tokens, summed."""
    if table.empty:
        raise NotDrawn("there is no mirror pair")
    tokens = histograms.sum(0)

    def draw(figure: Any) -> None:
        from matplotlib.colors import LogNorm

        alike, where = figure.subplots(1, 2, width_ratios=[3, 2])
        pairs = table.head(MOST)
        size = 9 if len(pairs) < 300 else 4
        alike.scatter(
            pairs["cosine"],
            pairs["divergence"],
            s=size,
            color=ORANGE,
            linewidths=0,
            clip_on=False,
            label="pair",
        )
        chance = np.asarray(random["divergence"].dropna() if len(random) else [], dtype=float)[:MOST]
        if len(chance):
            place = np.asarray(pairs["cosine"], dtype=float).min() - 0.012
            spread = np.linspace(-0.004, 0.004, len(chance))
            alike.plot(
                place + spread, chance, ".", color=FAINT, markersize=3, label="random pair (any cosine)"
            )
        alike.set_ylim(-0.03, 1.03)
        alike.set_xlabel("cosine of the tuned with the base direction")
        alike.set_ylabel("divergence: 1 = on different tokens")
        alike.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handlelength=1)
        shown = np.ma.masked_less(tokens, 1)
        shown[0, 0] = np.ma.masked  # neither fires: nearly all tokens
        where.imshow(
            shown.T, origin="lower", cmap="Greys", norm=LogNorm(vmin=1, vmax=max(10, shown.max() or 1))
        )
        for j, i in np.argwhere(tokens):
            dark = j + i > 0 and np.log10(tokens[j, i]) > 0.6 * np.log10(max(10, shown.max()))
            colour = "white" if dark else DARK
            where.text(j, i, _short(int(tokens[j, i])), ha="center", va="center", fontsize=7, color=colour)
        where.set_xticks(range(5), BIN_NAMES)
        where.set_yticks(range(5), BIN_NAMES)
        where.set_xlabel("tuned latent, of its largest activation")
        where.set_ylabel("base latent")
        where.set_title(f"tokens, summed over {len(table):,} pairs")

    return Drawing(draw, (7.5, 3.1))


def _short(count: int) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:.0f}{letter}" if count >= 10 * size else f"{count / size:.1f}{letter}"
    return str(count)
