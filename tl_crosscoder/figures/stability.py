"""The figure of two runs compared: the share of each class that both have, and how similar the matched latents are."""

from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.figures.drawing import DARK, FAINT, ORANGE, SOFT, Drawing, NotDrawn
from tl_crosscoder.figures.text import visible

WAYS = {"directions": ORANGE, "activations": SOFT}
NULLS = {
    "rotation": ("|", "rotated or shifted"),
    "shift": ("|", "rotated or shifted"),
    "random": ("x", "random latents"),
}


def stability_figure(table: pd.DataFrame, pairs: pd.DataFrame, at_least: float) -> Drawing:
    """Left: bars are the shares matched, ticks the nulls.  Right: the pairs' similarities."""
    seen: Any = table[(table["n_a"] > 0) & (table["n_b"] > 0)]
    if seen.empty:
        raise NotDrawn("no class has latents in both crosscoders")
    names = list(dict.fromkeys(seen["class"]))

    def draw(figure: Any) -> None:
        shares, alike = figure.subplots(1, 2)
        ways, told = [way for way in WAYS if way in set(seen["by"])], set()
        for step, way in enumerate(ways):
            rows = seen[seen["by"] == way].set_index("class").reindex(names)
            places = np.arange(len(names)) + (step - (len(ways) - 1) / 2) * 0.36
            shares.barh(places, rows["share"], height=0.32, color=WAYS[way], linewidth=0, label=f"by {way}")
            for null, (mark, said) in NULLS.items():
                known = (
                    np.isfinite(rows[null].to_numpy(float))
                    if null in rows
                    else np.zeros(len(rows), dtype=bool)
                )
                if known.any():
                    label = None if said in told else said
                    told.add(said)
                    shares.plot(rows[null][known], places[known], mark, color=DARK, markersize=6, label=label)
        sizes = seen.drop_duplicates("class").set_index("class")
        ticks = [
            f"{visible(str(name))}\n{sizes.loc[name, 'n_a']:,} | {sizes.loc[name, 'n_b']:,}" for name in names
        ]
        shares.set_yticks(range(len(names)), ticks)
        shares.invert_yaxis()
        shares.set_xlim(0, 1)
        shares.tick_params(axis="y", length=0)
        shares.set_xlabel(f"share matched, similarity ≥ {at_least:g}")
        shares.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=2, handlelength=1)
        edges = np.linspace(-0.2, 1, 49)
        similar = {"cosine": ("directions", pairs["cosine"])}
        if "correlation" in pairs:
            similar["correlation"] = ("activations", pairs["correlation"])
        for name, (way, values) in similar.items():
            known = np.asarray(values.dropna(), dtype=float).clip(edges[0], edges[-1])
            alike.hist(
                known, edges, histtype="step", color=WAYS[way] if way == "directions" else DARK, label=name
            )
        alike.axvline(at_least, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        alike.set_xlabel("similarity of the pairs matched by direction")
        alike.set_ylabel("pairs")
        alike.legend(loc="upper right", handlelength=1)

    return Drawing(draw, (7.5, 3.1))
