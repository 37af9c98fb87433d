"""The figure of the mean difference: its size at each position, and what adding or taking it does."""

from typing import Any

import pandas as pd

from tl_crosscoder.figures.drawing import BLUE, ORANGE, SOFT, Drawing

ADDED, SUBTRACTED = "added to base", "subtracted from tuned"
DIFFERENCE, RANDOM = "mean difference", "random direction"


def difference_figure(table: pd.DataFrame, steered: pd.DataFrame) -> Drawing:
    """Left: the norm at each position.  Then, for each behaviour, coherent answers that show it over the norm added or taken."""
    names = list(steered["behaviour"].unique()) if len(steered) else []
    here: Any = table[table["position"] != "all"]
    colours = {ADDED: BLUE, SUBTRACTED: ORANGE}

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
        panels[0].bar(here["position"], here["relative_norm"], color=ORANGE, width=0.6)
        panels[0].set(title="mean difference, of an activation's norm", xlabel="position in the document")
        for axes, name in zip(panels[1:], names, strict=True):
            for how, colour in colours.items():
                for direction, style in (
                    (RANDOM, {"color": SOFT, "ls": ":"}),
                    (DIFFERENCE, {"color": colour}),
                ):
                    plain, rates = curve(steered, name, how, direction, "rate_coherent")
                    label = how if direction == DIFFERENCE else None
                    axes.plot([0, *rates.index], [plain, *rates], label=label, marker="o", ms=3, **style)
            axes.set(title=f"{name}: shown, coherently", ylim=(-0.04, 1.04))
            axes.set_xlabel("norm added or taken, of an activation's")
            axes.legend(fontsize=7)

    return Drawing(draw, (2.9 * (1 + len(names)), 2.4))


def curve(
    steered: pd.DataFrame, behaviour: str, how: str, direction: str, column: str
) -> tuple[float, pd.Series]:
    """A share of the answers without steering, and by strength."""
    rows: Any = steered[(steered["behaviour"] == behaviour) & (steered["how"] == how)]
    plain = rows.loc[rows["strength"] == 0, column].iloc[0]
    own = rows[(rows["strength"] > 0) & (rows["direction"] == direction)]
    return float(plain), own.set_index("strength")[column].sort_index()
