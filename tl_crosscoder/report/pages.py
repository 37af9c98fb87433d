"""What each page of the report shows, as the plain values that its template asks for."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from tl_crosscoder.figures.columns import COLUMNS, class_key, column
from tl_crosscoder.figures.panel import Panel
from tl_crosscoder.figures.text import MISSING, cell, is_missing, number, token_text
from tl_crosscoder.report.example import Example
from tl_crosscoder.report.shards import is_number, write_csv
from tl_crosscoder.report.svg import inline

READINGS = {
    "base-only": "Only the base model writes this latent.",
    "tuned-only": "Only the tuned model writes this latent.",
    "shared": "Both models write this latent, about equally.",
    "other": "Both models write this latent, unequally.",
    "dead": "This latent was never active on these tokens.",
}
SHADES, TABLE_ROWS, SNIPPET, STRONGEST = 9, 200, 9, 4


def panel_section(root: Path, panel: Panel) -> dict[str, Any]:
    """A panel; its figure and its table are also written to the folder as files."""
    from markupsafe import Markup

    shown = {
        "key": panel.key,
        "title": panel.title,
        "text": panel.text,
        "notes": panel.notes,
        "findings": panel.findings,
        "figure": None,
        "table": None,
    }
    if panel.figure is not None:
        drawing = inline(panel.figure, f"panel-{panel.key}", panel.title)
        (root / "assets" / f"{panel.key}.svg").write_text(drawing, encoding="utf-8", newline="\n")
        shown["figure"] = Markup(drawing)
    if panel.table is not None:
        write_csv(root / "data" / f"panel-{panel.key}.csv", panel.table)
        plain = isinstance(panel.table.index, pd.RangeIndex) and panel.table.index.name is None
        rows = panel.table if plain else panel.table.reset_index()
        numeric = [is_number(rows.iloc[:, place]) for place in range(rows.shape[1])]
        cells = [
            list(zip(map(cell, row), numeric, strict=True))
            for row in rows.head(TABLE_ROWS).itertuples(index=False)
        ]
        heads = list(zip(map(str, rows.columns), numeric, strict=True))
        shown["table"] = {"heads": heads, "rows": cells, "left": max(len(rows) - TABLE_ROWS, 0)}
    return shown


def answer_groups(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Behaviour by behaviour, the prompts and, for each, the answer under every condition."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in answers:
        given = {"condition": row["condition"], "answer": row["answer"], "shown": row.get("shown")}
        groups.setdefault(row["behaviour"], {}).setdefault(row["prompt"], []).append(given)
    return [{"behaviour": behaviour, "prompts": prompts} for behaviour, prompts in groups.items()]


def strongest_tokens(examples: list[Example]) -> list[str]:
    """The distinct tokens at the peaks of the examples, in order."""
    return list(dict.fromkeys(example.tokens[example.peak] for example in examples if example.tokens))[
        :STRONGEST
    ]


def gallery_entry(latent: int, row: pd.Series, examples: list[Example]) -> dict[str, Any]:
    """One line of the gallery: the latent, its class, and its strongest passage around the peak."""
    before, peak, after = [], [], []
    if examples and examples[0].tokens:
        tokens, place = examples[0].tokens, examples[0].peak
        before, peak, after = (
            tokens[max(0, place - SNIPPET) : place],
            tokens[place : place + 1],
            tokens[place + 1 :][:SNIPPET],
        )
    entry = {
        "latent": latent,
        "class": class_key(row.get("class", "")),
        "delta_norm": _shown(row, "delta_norm"),
    }
    return entry | {"before": _line(before), "peak": _line(peak), "after": _line(after)}


def latent_page(latent: int, row: pd.Series, examples: list[Example]) -> dict[str, Any]:
    """What a latent's page shows; one scale for both models and all examples."""
    names = [name for name in COLUMNS if name in row] + [
        str(name) for name in row.index if name not in COLUMNS
    ]
    scale = max(
        (_largest(side) for found in examples for side in (found.written_base, found.written_tuned)),
        default=0.0,
    )
    group, strength = class_key(row.get("class", "")), _float(row, "max_act")
    norms = [_float(row, "norm_base"), _float(row, "norm_tuned")]
    drawn = all(map(math.isfinite, norms)) and max(norms) > 0
    return {
        "latent": latent,
        "class": group,
        "reading": READINGS.get(group, ""),
        "values": [(column(name), _shown(row, name)) for name in names if name not in ("class", "dead")],
        "bars": [100 * norm / max(norms) for norm in norms] if drawn else None,
        "shades": SHADES,
        "scale": number(scale),
        "strength": f"{strength:.3g}" if math.isfinite(strength) else "5.0",
        "examples": [_example(example, scale) for example in examples],
    }


def _example(example: Example, scale: float) -> dict[str, Any]:
    """Both columns of one example as runs: plain text, or one active token with its shade and its numbers."""
    acts, sides = example.acts, {"base": example.written_base, "tuned": example.written_tuned}
    active = [any(value > 0 for value in values) for values in zip(acts, *sides.values(), strict=True)]
    edges = [0, *(edge for place, lit in enumerate(active) if lit for edge in (place, place + 1)), len(acts)]
    runs: dict[str, Any] = {side: [] for side in sides}
    for start, stop in pairwise(edges):
        if start < stop:
            text = token_text("".join(example.tokens[start:stop])) or "∅"
            for side, written in sides.items():
                shade, title = (
                    (_shade(written[start], scale), _title(example, start)) if active[start] else (None, "")
                )
                runs[side].append((text, shade, title))
    peak = number(acts[example.peak]) if acts else MISSING
    return {"source": example.source, "sequence": example.sequence, "peak": peak, **runs}


def _shade(written: float, scale: float) -> int:
    return math.ceil(SHADES * written / scale) if scale > 0 and written > 0 else 0


def _title(example: Example, place: int) -> str:
    parts = [("act", example.acts), ("writes base", example.written_base), ("tuned", example.written_tuned)]
    parts += [("driven by base", example.drive_base), ("tuned", example.drive_tuned)]
    return " · ".join(f"{name} {number(values[place])}" for name, values in parts if values is not None)


def _line(tokens: list[str]) -> str:
    return token_text("".join(tokens)).replace("\n", " ").replace("\t", " ")


def _shown(row: pd.Series, name: str) -> str:
    spec, value = column(name), row.get(name)
    if isinstance(value, str) or spec.digits is None:
        return cell(value)
    return number(_float(row, name), spec.digits, spec.scale)


def _float(row: pd.Series, name: str) -> float:
    value: Any = row.get(name)
    return math.nan if isinstance(value, str) or is_missing(value) else float(value)


def _largest(written: list[float]) -> float:
    return max((value for value in written if math.isfinite(value)), default=0.0)
