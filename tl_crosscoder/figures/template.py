"""The figure of the chat template: how much of a latent's firing is on its tokens, and in which slot."""

from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.figures.drawing import DARK, FAINT, ORANGE, SOFT, Drawing, NotDrawn
from tl_crosscoder.figures.text import visible


def template_figure(latents: pd.DataFrame, slots: pd.DataFrame, strengths: pd.DataFrame) -> Drawing:
    """Left: the template's share of firings, called against shared; of weak and strong ones.  Right: in each slot, beside chance.

    Columns of ``latents``: template_fraction, called, class, enough; of ``slots``: token, share_of_tokens, called, shared; of
    ``strengths``: latents (the called ones, then the shared), strength, share.
    """
    if not len(latents) or not len(slots):
        raise NotDrawn("no latent fired in a chat")
    kept: Any = latents[latents["enough"].astype(bool)]
    called = kept[kept["called"].astype(bool)]
    shared = kept[(kept["class"] == "shared") & ~kept["called"].astype(bool)]

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3, width_ratios=[1, 0.8, 1.3])
        for part, colour, label in ((shared, DARK, "shared"), (called, ORANGE, "in question")):
            if len(part):
                share = np.full(len(part), 100 / len(part))
                style = {"histtype": "step", "color": colour, "label": f"{label}, {len(part):,}"}
                left.hist(part["template_fraction"], np.linspace(0, 1, 21), weights=share, **style)
        left.set_xlabel("share of firings on the template")
        left.set_ylabel("latents, %")
        left.legend(loc="upper right", handlelength=1)
        names = list(dict.fromkeys(strengths["latents"]))[:2] if len(strengths) else []
        for name, colour in zip(names, (ORANGE, DARK), strict=False):
            rows = strengths[strengths["latents"] == name]
            middle.plot(rows["strength"], 100 * rows["share"].astype(float), "o-", color=colour, markersize=3)
        chance = 100 * float(np.asarray(slots["share_of_tokens"], float).sum())
        middle.axhline(chance, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        middle.tick_params(axis="x", rotation=60, length=0)
        middle.set_ylim(bottom=0)
        middle.set_ylabel("on the template, %")
        middle.set_title("by strength of the firing")
        places = np.arange(len(slots))
        columns = (
            ("share_of_tokens", FAINT, "of the tokens"),
            ("shared", SOFT, "shared"),
            ("called", ORANGE, "in question"),
        )
        for i, (name, colour, label) in enumerate(columns):
            values = 100 * np.nan_to_num(np.asarray(slots[name], float))
            right.bar(places + (i - 1) * 0.27, values, width=0.25, color=colour, linewidth=0, label=label)
        names = [visible(str(token).replace("\n", "↵")) for token in slots["token"]]
        right.set_xticks(places, names, rotation=60, ha="right")
        right.tick_params(axis="x", length=0)
        right.set_ylabel("%, mean over latents")
        right.set_title("in each slot of an exchange")
        right.legend(handlelength=1)

    return Drawing(draw, (9.0, 3.0))
