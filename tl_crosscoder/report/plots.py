"""The report's figures as SVG text: plain tables in, the same bytes out for the same table.

Blue is the base model and orange the tuned one, everywhere (Okabe and Ito's colour-blind-safe pair, darkened for thin lines).  The
background is transparent and the greys are readable on white and on black, so that one file serves both.  Latents that have died
are left out.  A figure whose columns are absent raises :class:`NotDrawn`.
"""

import io
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.report.columns import class_key
from tl_crosscoder.report.text import number, visible

BLUE, ORANGE, DARK, INK, SOFT, FAINT = "#2a6fb0", "#d8701c", "#565656", "#7a7a7a", "#9d9d9d", "#c4c4c4"
CLASS_COLOURS = {"base-only": BLUE, "tuned-only": ORANGE, "shared": SOFT}
#: Latent Scaling's gates for a truly tuned-only latent, and the range outside which a ratio means nothing (arXiv:2504.02922).
NU_ERROR_GATE, NU_RECON_GATE, NU_RANGE = 0.2, 0.5, (-0.1, 2.0)
MAX_POINTS, MAX_STEPS = 3000, 600

STYLE = {
    "svg.hashsalt": "tl_crosscoder",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
}


class NotDrawn(ValueError):
    """A figure whose data are absent; the message says what is missing."""


def training_curves(history: pd.DataFrame) -> str:
    """Loss, variance explained, L0 and dead latents against the training step, as far as ``history`` has them."""
    groups = {
        "loss": [name for name in history if "loss" in str(name)],
        "variance explained": [name for name in history if str(name).startswith("fve")],
        "L0": [name for name in history if str(name).startswith("l0")],
        "dead": [name for name in history if str(name).startswith("dead")],
    }
    groups = {
        title: names for title, names in groups.items() if any(history[name].notna().any() for name in names)
    }
    if not groups:
        raise NotDrawn("the history has no column of loss, fve, l0 or dead")
    rows = history.iloc[np.unique(np.linspace(0, len(history) - 1, MAX_STEPS).round().astype(int))]
    steps = rows["step"].to_numpy(float) if "step" in rows else rows.index.to_numpy(float)

    def draw(figure: Any) -> None:
        for axes, (title, names) in zip(
            np.atleast_1d(figure.subplots(1, len(groups))), groups.items(), strict=True
        ):
            greys = iter((INK, SOFT, FAINT) * len(names))
            for name in names:
                line = (
                    BLUE
                    if str(name).endswith("_base")
                    else ORANGE
                    if str(name).endswith("_tuned")
                    else next(greys)
                )
                values = rows[name].to_numpy(float)
                axes.plot(
                    steps[np.isfinite(values)],
                    values[np.isfinite(values)],
                    color=line,
                    label=visible(str(name)),
                )
            if title == "loss" and all((rows[name].dropna() > 0).all() for name in names):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
            if len(names) > 1:
                axes.legend(fontsize=7.5, handlelength=1.2)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.xaxis.set_major_formatter(
                lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
            )
            axes.locator_params(axis="x", nbins=4)

    return _svg(draw, (7.5, 2.2))


def delta_norm_histogram(table: pd.DataFrame) -> str:
    """How many latents have which Δnorm (log scale), the classes as bands; dark outline: those that pass both Latent Scaling gates."""
    _need(table, "delta_norm")
    alive = _alive(table)
    values = alive["delta_norm"].to_numpy(float)
    edges = np.linspace(0, 1, 51)
    centres = (edges[:-1] + edges[1:]) / 2
    counts = np.histogram(values[np.isfinite(values)], edges)[0]
    bands = [("base-only", 0.0, 0.1), ("shared", 0.4, 0.6), ("tuned-only", 0.9, 1.0)]

    def draw(figure: Any) -> dict[str, tuple[str, Any]]:
        axes = figure.subplots()
        colours = [
            next((CLASS_COLOURS[name] for name, low, high in bands if low < x < high), FAINT) for x in centres
        ]
        axes.bar(centres, counts, width=0.018, color=colours, linewidth=0)
        axes.set_yscale("symlog", linthresh=1, linscale=0.4)
        axes.set_ylim(0, max(10, counts.max(initial=1)) * 12)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for name, low, high in bands:
            axes.axvspan(low, high, color=CLASS_COLOURS[name], alpha=0.08, linewidth=0)
            inside = int(
                (
                    (values < 0.1)
                    if low == 0
                    else (values > 0.9)
                    if high == 1
                    else (values >= 0.4) & (values < 0.6)
                ).sum()
            )
            place: Any = {0.0: ("left", 0.004), 0.4: ("center", 0.5), 0.9: ("right", 0.996)}[low]
            text = f"{name}\n{inside:,}"
            axes.text(
                place[1],
                0.97,
                text,
                ha=place[0],
                va="top",
                transform=axes.get_xaxis_transform(),
                linespacing=1.5,
            )
        if {"nu_error", "nu_recon"} <= set(alive):
            gated = np.histogram(values[_gated(alive)], edges)[0]
            axes.stairs(
                gated, edges, color=DARK, linewidth=1.1, label=f"passes both ν gates ({gated.sum():,})"
            )
            axes.legend(loc="upper left", bbox_to_anchor=(0.6, 0.99), handlelength=1.2)
        axes.set_xlim(0, 1)
        axes.set_xlabel("Δnorm (0 base only, ½ both, 1 tuned only)")
        axes.set_ylabel("latents")
        return {"x": ("delta_norm", axes)}

    return _svg(draw, (7.5, 2.9))


def nu_scatter(table: pd.DataFrame) -> str:
    """``nu_error`` against ``nu_recon``, coloured by Δnorm, with the gates drawn: lower left is truly tuned-only."""
    _need(table, "nu_error", "nu_recon", "delta_norm")
    alive = _alive(table)
    error, recon = alive["nu_error"].to_numpy(float), alive["nu_recon"].to_numpy(float)
    low, high = NU_RANGE
    within = (error >= low) & (error <= high) & (recon >= low) & (recon <= high)
    if not within.any():
        raise NotDrawn(f"no latent has nu_error and nu_recon within {low} and {high}")
    gated = _gated(alive)
    shown = _thin(within, gated)

    def draw(figure: Any) -> dict[str, tuple[str, Any]]:
        from matplotlib.colors import LinearSegmentedColormap

        axes = figure.subplots()
        axes.add_patch(_rectangle(low, low, NU_RECON_GATE, NU_ERROR_GATE))
        axes.axvline(NU_RECON_GATE, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.axhline(NU_ERROR_GATE, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        colours = LinearSegmentedColormap.from_list("delta_norm", [BLUE, "#a8a8a8", ORANGE], N=11)
        shade = alive["delta_norm"].to_numpy(float)[shown]
        points = {"cmap": colours, "vmin": 0, "vmax": 1, "s": 7, "linewidths": 0, "clip_on": False}
        dots = axes.scatter(recon[shown], error[shown], c=shade, **points)
        bar = figure.colorbar(dots, ax=axes, aspect=28, pad=0.02, ticks=[0, 0.5, 1])
        bar.set_label("Δnorm")
        bar.outline.set_visible(False)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.text(
            NU_RECON_GATE + 0.03, low + 0.04, f"tuned-only: {gated.sum():,}", color=ORANGE, fontweight="bold"
        )
        axes.set_xlabel("ν of the reconstruction")
        axes.set_ylabel("ν of the error")
        if shown.sum() < within.sum():
            axes.set_title(
                f"{shown.sum():,} of {within.sum():,} latents drawn; inside the gates, all of them",
                fontsize=7.5,
            )
        return {"x": ("nu_recon", axes), "y": ("nu_error", axes)}

    return _svg(draw, (7.5, 4.2))


def kl_bars(table: pd.DataFrame) -> str:
    """KL from the tuned model for every condition, on each set of tokens, with its interval; lower is closer to the tuned model.

    Columns: condition, tokens (such as "all" and "first 9"), kl, ci_low, ci_high; kl in nats a token.
    """
    _need(table, "condition", "tokens", "kl")
    bars = table.rename(columns={"kl": "value", "ci_low": "low", "ci_high": "high"})
    return _bar_panels(
        bars.assign(panel=table["tokens"].map(lambda tokens: f"{tokens} tokens")), "KL, nats a token"
    )


def behaviour_bars(table: pd.DataFrame) -> str:
    """How often each behaviour is shown under each condition, with its interval.  Columns: behaviour, condition, rate, low, high."""
    _need(table, "behaviour", "condition", "rate")
    bars = table.rename(columns={"behaviour": "panel", "rate": "value"})
    bars = bars.assign(
        **{name: bars[name].astype(float) * 100 for name in ("value", "low", "high") if name in bars}
    )
    return _bar_panels(bars, "answers that show it, %", limit=100)


def _bar_panels(table: pd.DataFrame, label: str, limit: float | None = None) -> str:
    """One row of bars a condition, one set of axes a ``panel``; three abreast."""
    conditions, names = list(dict.fromkeys(table["condition"])), list(dict.fromkeys(table["panel"]))
    places, abreast = np.arange(len(conditions)), min(3, len(names))
    deep = -(-len(names) // abreast)

    def draw(figure: Any) -> None:
        grid = figure.subplots(deep, abreast, sharey=True, squeeze=False).ravel()
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(grid, names, strict=False):
            rows = (
                table[table["panel"] == name]
                .drop_duplicates("condition")
                .set_index("condition")
                .reindex(conditions)
            )
            value = rows["value"].to_numpy(float)
            axes.barh(
                places,
                np.nan_to_num(value),
                height=0.6,
                color=[_condition_colour(c) for c in conditions],
                linewidth=0,
            )
            tops = _whiskers(axes, places, value, rows)
            span = limit or max(np.nanmax(tops, initial=0), 1e-9)
            for place, here, top in zip(places, value, tops, strict=True):
                axes.text(top + span * 0.03, place, number(here), va="center", fontsize=7.5)
            axes.set_xlim(0, span * 1.2)
            axes.locator_params(axis="x", nbins=4)
            axes.set_title(textwrap.fill(visible(str(name)), 36))
            axes.set_xlabel(label)
            axes.tick_params(axis="y", length=0)
        grid[0].set_yticks(places, [visible(str(name)) for name in conditions])
        grid[0].invert_yaxis()

    return _svg(draw, (7.5, deep * (0.85 + 0.25 * len(conditions))))


def _condition_colour(condition: object) -> str:
    name = str(condition)
    if name in ("none", "base", "tuned"):
        return ORANGE if name == "tuned" else BLUE
    return FAINT if any(word in name for word in ("random", "matched", "control", "same firing")) else SOFT


def difference_share_bars(table: pd.DataFrame, top: int = 16) -> str:
    """The latents that explain most of the difference between the models, by class, each with its share in per cent."""
    _need(table, "difference_share")
    ranked = _alive(table)["difference_share"].dropna().sort_values(ascending=False, kind="stable").iloc[:top]
    if ranked.empty:
        raise NotDrawn("no latent has a difference_share")
    classes = table["class"].map(class_key) if "class" in table else pd.Series("", index=table.index)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        labels = [classes[latent] for latent in ranked.index]
        for name in dict.fromkeys(labels):
            here = np.array([label == name for label in labels])
            bars = {
                "color": CLASS_COLOURS.get(name, FAINT),
                "linewidth": 0,
                "label": visible(name) or "latent",
            }
            axes.bar(np.flatnonzero(here), ranked.to_numpy(float)[here] * 100, width=0.7, **bars)
        axes.set_xticks(range(len(ranked)), [str(latent) for latent in ranked.index], rotation=45, ha="right")
        axes.set_xlabel("latent")
        axes.set_ylabel("share of the difference, %")
        axes.tick_params(axis="x", length=0)
        axes.legend(handlelength=1)

    return _svg(draw, (7.5, 2.7))


def _svg(draw: Callable[[Any], dict[str, tuple[str, Any]] | None], size: tuple[float, float]) -> str:
    """The SVG of what ``draw`` puts on a figure.  If it names the columns on its axes, the page lets the reader brush them."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's own fonts have the glyph
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        brushes = draw(figure) or {}
        out = io.StringIO()
        metadata: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
        attributes = _brush_attributes(figure, brushes)
    text = out.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f"<svg {attributes}", 1)


def _brush_attributes(figure: Any, brushes: dict[str, tuple[str, Any]]) -> str:
    """Where the axes lie in the drawing and which values their ends have, for the page's script."""
    written = ""
    for way, (name, axes) in brushes.items():
        box, height = axes.get_window_extent(), figure.bbox.height
        start, stop = (box.x0, box.x1) if way == "x" else (height - box.y0, height - box.y1)
        low, high = axes.get_xlim() if way == "x" else axes.get_ylim()
        written += f'data-{way}="{name} {start:.2f} {stop:.2f} {low:g} {high:g}" '
    return written


def _need(table: pd.DataFrame, *names: str) -> None:
    if missing := [name for name in names if name not in table]:
        raise NotDrawn(f"the table has no column {' or '.join(missing)}")
    if table.empty:
        raise NotDrawn("the table has no rows")
    if empty := [name for name in names if not table[name].notna().any()]:
        raise NotDrawn(f"{empty[0]} has no value in any row")


def _alive(table: pd.DataFrame) -> pd.DataFrame:
    dead = np.zeros(len(table), dtype=bool)
    if "dead" in table:
        dead |= table["dead"].fillna(False).to_numpy(bool)
    if "class" in table:
        dead |= (table["class"].map(class_key) == "dead").to_numpy(bool)
    return table[~dead]


def _gated(table: pd.DataFrame) -> np.ndarray:
    error, recon = table["nu_error"].to_numpy(float), table["nu_recon"].to_numpy(float)
    low = NU_RANGE[0]
    return (error >= low) & (error < NU_ERROR_GATE) & (recon >= low) & (recon < NU_RECON_GATE)


def _thin(within: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Every row to keep and, evenly spread, as many of the others within the range as a page can show."""
    shown = within & keep
    others = np.flatnonzero(within & ~keep)
    room = max(MAX_POINTS - int(shown.sum()), 0)
    shown[
        others[np.unique(np.linspace(0, len(others) - 1, room).round().astype(int))]
        if len(others) > room
        else others
    ] = True
    return shown


def _rectangle(x: float, y: float, right: float, top: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), right - x, top - y, color=ORANGE, alpha=0.1, linewidth=0)


def _whiskers(axes: Any, places: np.ndarray, value: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """Draw the intervals where the table has them; returns how far right each bar reaches."""
    reach = np.nan_to_num(value)
    if {"low", "high"} <= set(rows):
        lows, highs = rows["low"].to_numpy(float), rows["high"].to_numpy(float)
        axes.hlines(places, lows, highs, color=DARK, linewidth=1)
        reach = np.fmax(reach, np.nan_to_num(highs))
    return reach
