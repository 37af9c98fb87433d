"""What steering does over strength: how often the behaviour is shown, and what it costs in sense."""

from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.figures.drawing import BLUE, FAINT, ORANGE, SOFT, Drawing, NotDrawn
from tl_crosscoder.figures.text import visible

COLOURS = {"base": BLUE, "tuned": ORANGE}
CONTROLS = {"random latents": "--", "random directions": ":"}
NEEDED = (
    "behaviour", "prompts", "side", "target", "kind", "strength",
    "rate", "rate_coherent", "perplexity_base", "perplexity_tuned",
)  # fmt: skip


def strength_curves(table: pd.DataFrame) -> Drawing:
    """A column for each behaviour and kind of prompts; above the share of coherent answers that show it (thin: each target alone,
    faint: the share in any answer), below the perplexity of the answers under the better of the two unsteered models.

    Blue: steering the base model.  Orange: the tuned one.
    """
    if missing := [name for name in NEEDED if name not in table]:
        raise NotDrawn(f"the table has no column {' or '.join(missing)}")
    if table.empty:
        raise NotDrawn("the table has no rows")
    columns = list(dict.fromkeys(zip(table["behaviour"], table["prompts"], strict=True)))
    better = table[["perplexity_base", "perplexity_tuned"]].min(axis=1)
    table = table.assign(share=100 * table["rate_coherent"], any=100 * table["rate"], perplexity=better)
    main = [t for t in dict.fromkeys(table["target"]) if t != "none"][-1]

    def draw(figure: Any) -> None:
        grid = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
        for column, (behaviour, prompts) in enumerate(columns):
            here = _where(table, behaviour=behaviour, prompts=prompts)
            top, bottom = grid[:, column]
            for side in COLOURS:
                _one_model(top, bottom, _where(here, side=side), side, main)
            top.set_title(f"{visible(behaviour)}\n{prompts} prompts")
            top.set_ylim(-3, 103)
            bottom.set_yscale("log")
            bottom.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            bottom.set_xlabel("strength")
        grid[0, 0].set_ylabel("coherent answers\nthat show it, %")
        grid[1, 0].set_ylabel("perplexity\nof the answers")
        grid[1, 0].legend(fontsize=7.5, handlelength=1.2)

    return Drawing(draw, (max(3.5, 1.9 * len(columns) + 0.6), 4.0))


def _one_model(top: Any, bottom: Any, mine: pd.DataFrame, side: str, main: str) -> None:
    """One model's lines: its controls, each other target thin, and ``main`` with its share in any answer and its perplexity."""
    values = ((top, "share"), (bottom, "perplexity"))
    grey = {"color": SOFT if side == "tuned" else FAINT, "linewidth": 1}
    for kind, dashes in CONTROLS.items():
        for axes, value in values:
            _line(axes, mine, main, kind, value, linestyle=dashes, **grey)
    colour = COLOURS[side]
    for target in dict.fromkeys(mine["target"]):
        if target not in ("none", main):
            _line(top, mine, target, "latents", "share", color=colour, linewidth=0.5)
    _line(top, mine, main, "latents", "any", color=colour, linewidth=4, alpha=0.2)
    dotted = {"color": colour, "marker": "o", "markersize": 2.5, "label": f"{side}, {main}"}
    for axes, value in values:
        _line(axes, mine, main, "latents", value, **dotted)


def _where(table: pd.DataFrame, **equal: str) -> pd.DataFrame:
    """The rows with these values."""
    chosen = np.all([(table[name] == value).to_numpy(bool) for name, value in equal.items()], axis=0)
    return table.iloc[np.flatnonzero(chosen)]


def _line(axes: Any, rows: pd.DataFrame, target: str, kind: str, value: str, **style: Any) -> None:
    """Over strength, through the unsteered model at 0."""
    targets, kinds = rows["target"].to_numpy(), rows["kind"].to_numpy()
    chosen = rows.iloc[np.flatnonzero((targets == "none") | ((targets == target) & (kinds == kind)))]
    chosen = chosen.sort_values(by="strength")
    axes.plot(np.asarray(chosen["strength"], float), np.asarray(chosen[value], float), **style)
