"""The figures of every report: plain tables in.  Latents that have died are left out.

A figure whose columns are absent raises :class:`NotDrawn`, which says what is missing.
"""

import textwrap
from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.figures.columns import class_key
from tl_crosscoder.figures.drawing import BLUE, DARK, FAINT, INK, ORANGE, SOFT, Brushes, Drawing, NotDrawn
from tl_crosscoder.figures.text import is_missing, number, visible
from tl_crosscoder.gates import (
    LEAST_FIRED,
    NU_ERROR_GATE,
    NU_HIGH,
    NU_LOW,
    NU_RECON_GATE,
    tuned_specific,
)

CLASS_COLOURS = {"base-only": BLUE, "tuned-only": ORANGE, "shared": SOFT}
MAX_POINTS, MAX_STEPS, ABREAST = 3000, 600, 3


def training_curves(history: pd.DataFrame) -> Drawing:
    """Loss, variance explained, L0 and dead latents against the training step, as far as ``history`` has them."""
    starts = {"loss": "loss", "variance explained": "fve", "L0": "l0", "dead": "dead"}
    filled = [str(name) for name in history if not _is_empty(history, name)]
    groups = {title: [name for name in filled if name.startswith(start)] for title, start in starts.items()}
    groups = {title: names for title, names in groups.items() if names}
    if not groups:
        raise NotDrawn("the history has no column of loss, fve, l0 or dead")
    rows = history.iloc[_spread(len(history), MAX_STEPS)]
    steps = _floats(rows, "step") if "step" in rows else np.asarray(rows.index, dtype=float)

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogLocator

        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (title, names) in zip(panels, groups.items(), strict=True):
            lines = _line_colours(names)
            for name in names:
                values = _floats(rows, name)
                known = np.isfinite(values)
                axes.plot(steps[known], values[known], color=lines[name], label=visible(name))
            if title == "loss" and all((_floats(rows, name) > 0).all() for name in names):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.minorticks_off()
            if len(names) > 1:
                axes.legend(fontsize=7.5, handlelength=1.2)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
            axes.locator_params(axis="x", nbins=4)

    return Drawing(draw, (7.5, 2.2))


def delta_norm_histogram(table: pd.DataFrame) -> Drawing:
    """How many latents have which Δnorm (log scale), the classes as bands; outlined: those that pass both gates."""
    _need(table, "delta_norm")
    alive = _alive(table)
    values = _floats(alive, "delta_norm")
    edges = np.linspace(0, 1, 51)
    centres = (edges[:-1] + edges[1:]) / 2
    counts = np.histogram(values[np.isfinite(values)], edges)[0]
    bands = {
        "base-only": (0.0, 0.1, values < 0.1, "left"),
        "shared": (0.4, 0.6, (values >= 0.4) & (values < 0.6), "center"),
        "tuned-only": (0.9, 1.0, values > 0.9, "right"),
    }

    def draw(figure: Any) -> Brushes:
        axes = figure.subplots()
        bars = axes.bar(centres, counts, width=0.018, color=FAINT, linewidth=0)
        axes.set_yscale("symlog", linthresh=1, linscale=0.4)
        axes.set_ylim(0, max(10, counts.max(initial=1)) * 12)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for name, (low, high, inside, side) in bands.items():
            axes.axvspan(low, high, color=CLASS_COLOURS[name], alpha=0.08, linewidth=0)
            for bar, centre in zip(bars, centres, strict=True):
                if low < centre < high:
                    bar.set_color(CLASS_COLOURS[name])
            x = {"left": 0.004, "center": 0.5, "right": 0.996}[side]
            top = {"ha": side, "va": "top", "transform": axes.get_xaxis_transform(), "linespacing": 1.5}
            axes.text(x, 0.97, f"{name}\n{inside.sum():,}", **top)
        if {"nu_error", "nu_recon"} <= set(alive):
            gated = np.histogram(values[_gated(alive)], edges)[0]
            axes.stairs(
                gated, edges, color=DARK, linewidth=1.1, label=f"passes both ν gates: {gated.sum():,}"
            )
            axes.legend(loc="upper left", bbox_to_anchor=(0.6, 0.99), handlelength=1.2)
        axes.set_xlim(0, 1)
        axes.set_xlabel("Δnorm (0 base only, ½ both, 1 tuned only)")
        axes.set_ylabel("latents")
        return {"x": ("delta_norm", axes)}

    return Drawing(draw, (7.5, 2.9))


def nu_scatter(table: pd.DataFrame) -> Drawing:
    """``nu_error`` against ``nu_recon``, coloured by Δnorm, with the gates drawn: lower left is truly tuned-only.

    Rings: latents that fired too rarely for the gates to count them.
    """
    _need(table, "nu_error", "nu_recon", "delta_norm")
    alive = _alive(table)
    error, recon, delta = (_floats(alive, name) for name in ("nu_error", "nu_recon", "delta_norm"))
    within = (error >= NU_LOW) & (error <= NU_HIGH) & (recon >= NU_LOW) & (recon <= NU_HIGH)
    if not within.any():
        raise NotDrawn(f"no latent has nu_error and nu_recon within {NU_LOW} and {NU_HIGH}")
    gated, would_pass = _gated(alive), _gated(alive, least=1)
    rare = _floats(alive, "n_fired") < LEAST_FIRED if "n_fired" in alive else np.zeros(len(alive), dtype=bool)
    others = np.flatnonzero(within & ~gated)
    passing = np.flatnonzero(within & gated)
    shown = np.append(others[_spread(len(others), max(MAX_POINTS - len(passing), 0))], passing)

    def draw(figure: Any) -> Brushes:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        width, height = NU_RECON_GATE - NU_LOW, NU_ERROR_GATE - NU_LOW
        axes.add_patch(Rectangle((NU_LOW, NU_LOW), width, height, color=ORANGE, alpha=0.1, linewidth=0))
        axes.axvline(NU_RECON_GATE, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.axhline(NU_ERROR_GATE, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        colours = LinearSegmentedColormap.from_list("delta_norm", [BLUE, "#a8a8a8", ORANGE], N=11)
        inks = colours(np.nan_to_num(delta[shown], nan=0.5))
        fill = np.where(rare[shown, None], 0, inks)
        axes.scatter(recon[shown], error[shown], s=7, c=fill, edgecolors=inks, linewidths=0.5, clip_on=False)
        bar = figure.colorbar(ScalarMappable(cmap=colours), ax=axes, aspect=28, pad=0.02, ticks=[0, 0.5, 1])
        bar.set_label("Δnorm")
        bar.outline.set_visible(False)
        axes.set_xlim(NU_LOW, NU_HIGH)
        axes.set_ylim(NU_LOW, NU_HIGH)
        inside = {"s": f"passes both: {gated.sum():,}", "color": ORANGE, "fontweight": "bold"}
        axes.text(NU_RECON_GATE + 0.03, NU_LOW + 0.13, **inside)
        if rare[shown].any():
            n_more = would_pass.sum() - gated.sum()
            rings = f"rings: fired on fewer than {LEAST_FIRED} tokens, not counted ({n_more:,} would pass)"
            axes.text(NU_RECON_GATE + 0.03, NU_LOW + 0.04, rings, fontsize=7.5)
        axes.set_xlabel("ν of the reconstruction")
        axes.set_ylabel("ν of the error")
        if len(shown) < within.sum():
            drawn = f"{len(shown):,} of {within.sum():,} latents drawn, among them all that pass both gates"
            axes.set_title(drawn, fontsize=7.5)
        return {"x": ("nu_recon", axes), "y": ("nu_error", axes)}

    return Drawing(draw, (7.5, 4.2))


def kl_bars(table: pd.DataFrame) -> Drawing:
    """KL from the tuned model under every condition, on each set of tokens; lower is closer to the tuned model.

    Columns: condition, tokens (such as "all" and "first 9"), kl, ci_low, ci_high; kl in nats a token.
    """
    _need(table, "condition", "tokens", "kl")
    bars = table.rename(columns={"kl": "value", "ci_low": "low", "ci_high": "high"})
    return _bar_panels(
        bars.assign(panel=[f"{tokens} tokens" for tokens in table["tokens"]]), "KL, nats a token"
    )


def behaviour_bars(table: pd.DataFrame) -> Drawing:
    """How often each behaviour is shown under each condition.  Columns: behaviour, condition, rate, low, high (shares)."""
    _need(table, "behaviour", "condition", "rate")
    bars = table.rename(columns={"behaviour": "panel", "rate": "value"})
    percent = {name: _floats(bars, name) * 100 for name in ("value", "low", "high") if name in bars}
    return _bar_panels(bars.assign(**percent), "answers that show it, %", limit=100.0)


def difference_share_bars(table: pd.DataFrame, top: int = 16) -> Drawing:
    """The latents that explain most of the difference between the models, by class, each with its share in per cent."""
    _need(table, "difference_share")
    alive = _alive(table)
    share = _floats(alive, "difference_share")
    best = np.argsort(np.nan_to_num(-share, nan=np.inf), kind="stable")[:top]
    best = best[np.isfinite(share[best])]
    if not len(best):
        raise NotDrawn("no living latent has a difference_share")
    classes = np.array(
        [class_key(name) for name in alive["class"]] if "class" in alive else ["latents"] * len(alive)
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name in dict.fromkeys(classes[best].tolist()):
            here = np.flatnonzero(classes[best] == name)
            colour = CLASS_COLOURS.get(name, FAINT)
            axes.bar(here, 100 * share[best][here], width=0.7, color=colour, linewidth=0, label=visible(name))
        axes.set_xticks(
            range(len(best)), [str(latent) for latent in alive.index[best]], rotation=45, ha="right"
        )
        axes.set_xlabel("latent")
        axes.set_ylabel("share of the difference, %")
        axes.tick_params(axis="x", length=0)
        axes.legend(handlelength=1)

    return Drawing(draw, (7.5, 2.7))


def _bar_panels(table: pd.DataFrame, label: str, limit: float | None = None) -> Drawing:
    """One row of bars a condition, one set of axes a ``panel``; three abreast."""
    conditions, names = list(dict.fromkeys(table["condition"])), list(dict.fromkeys(table["panel"]))
    colours, places = [_condition_colour(str(name)) for name in conditions], np.arange(len(conditions))
    unknown = np.full(len(table), np.nan)
    numbers = [_floats(table, name) if name in table else unknown for name in ("value", "low", "high")]
    found = dict(zip(zip(table["panel"], table["condition"], strict=True), np.stack(numbers, 1), strict=True))
    deep = -(-len(names) // ABREAST)

    def draw(figure: Any) -> None:
        grid = figure.subplots(deep, min(ABREAST, len(names)), sharey=True, squeeze=False).ravel()
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(grid, names, strict=False):
            value, low, high = np.stack([found.get((name, c), np.full(3, np.nan)) for c in conditions], 1)
            axes.set_title(textwrap.fill(visible(str(name)), 36))
            axes.tick_params(axis="y", length=0)
            if np.isnan(value).all():
                axes.text(0.04, 0.5, "nothing to count", transform=axes.transAxes, fontsize=7.5)
                axes.set_xticks([])
                continue
            axes.barh(places, np.nan_to_num(value), height=0.6, color=colours, linewidth=0)
            axes.hlines(places, low, high, color=DARK, linewidth=1)
            tops = np.fmax(np.nan_to_num(value), np.nan_to_num(high))
            span = limit or max(tops.max(), 1e-9)
            for place, here, top in zip(places, value, tops, strict=True):
                axes.text(top + span * 0.03, place, number(float(here)), va="center", fontsize=7.5)
            axes.set_xlim(0, span * 1.2)
            axes.locator_params(axis="x", nbins=4)
            axes.set_xlabel(label)
        grid[0].set_yticks(places, [visible(str(name)) for name in conditions])
        grid[0].invert_yaxis()

    return Drawing(draw, (7.5, deep * (0.85 + 0.25 * len(conditions))))


def _condition_colour(name: str) -> str:
    """The models have theirs, controls are faint, edits between."""
    known = {"none": BLUE, "base": BLUE, "tuned": ORANGE}
    return known.get(
        name, FAINT if any(word in name for word in ("random", "control", "same firing")) else SOFT
    )


def _line_colours(names: list[str]) -> dict[str, str]:
    greys = iter([INK, SOFT, FAINT] * len(names))
    sides = {"base": BLUE, "tuned": ORANGE}
    return {name: sides.get(name.rpartition("_")[2]) or next(greys) for name in names}


def _need(table: pd.DataFrame, *names: str) -> None:
    if missing := [name for name in names if name not in table]:
        raise NotDrawn(f"the table has no column {' or '.join(missing)}")
    if table.empty:
        raise NotDrawn("the table has no rows")
    if empty := [name for name in names if _is_empty(table, name)]:
        raise NotDrawn(f"{empty[0]} has no value in any row")


def _is_empty(table: pd.DataFrame, name: str) -> bool:
    return all(is_missing(value) for value in table[name])


def _floats(table: pd.DataFrame, name: str) -> np.ndarray:
    return np.asarray(table[name], dtype=float)


def _alive(table: pd.DataFrame) -> pd.DataFrame:
    dead = np.zeros(len(table), dtype=bool)
    if "dead" in table:
        dead |= np.array([value is True or value == 1 for value in table["dead"]])
    if "class" in table:
        dead |= np.array([class_key(name) == "dead" for name in table["class"]])
    return table.iloc[np.flatnonzero(~dead)]


def _gated(table: pd.DataFrame, least: int = LEAST_FIRED) -> np.ndarray:
    """Without a column of firings all have enough."""
    fired = {} if "n_fired" in table else {"n_fired": LEAST_FIRED}
    ratios = {name: _floats(table, name) for name in ("nu_error", "nu_recon")}
    return tuned_specific(table.assign(**ratios, **fired), least=least).to_numpy()


def _spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` places among ``count``, evenly spread, the ends included."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.arange(0)
    )
