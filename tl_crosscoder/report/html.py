"""The report: one folder that opens from disk, without a server or a network, in any browser."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from tl_crosscoder.report import plots
from tl_crosscoder.report.columns import COLUMNS, class_key, column
from tl_crosscoder.report.example import Example
from tl_crosscoder.report.panel import Panel
from tl_crosscoder.report.shards import write_csv, write_table
from tl_crosscoder.report.svg import inline
from tl_crosscoder.report.text import MISSING, cell, number, token_text, visible

FORMAT = 1
MARKER = "report.json"
SHADES = 9
TABLE_ROWS, GALLERY, SNIPPET = 200, 24, 9
#: Browsers without a network need nothing but these; no inline script or style, nothing from elsewhere.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'"


def write_report(
    directory: str | Path,
    *,
    title: str,
    verdict: list[str],
    facts: dict[str, str],
    table: pd.DataFrame,
    history: pd.DataFrame | None = None,
    panels: list[Panel] | None = None,
    examples: dict[int, list[Example]] | None = None,
    answers: list[dict[str, str]] | None = None,
) -> Path:
    """The folder that was written, whose ``index.html`` is the report; an existing report there is replaced as a whole.

    ``verdict`` is read first: a headline and the sentences that qualify it.  ``table`` has one row a latent, best first, and shows
    whichever known columns it has.  ``examples`` gives latents a page of their own, in this order.  ``answers`` are rows of
    behaviour, prompt, condition and answer, shown side by side.  ``panels`` follow the standard ones, or replace those whose key
    they share.  The same arguments give the same bytes.

    Raises ValueError for a latent twice in the table, a page for a latent that is not in it, two panels with one key;
    FileExistsError for a directory that holds something else than a report.
    """
    directory, examples = Path(directory).resolve(), examples or {}
    _check(directory, verdict, table, examples)
    wanted = {panel.key: panel for panel in standard_panels(table, history)}
    if len({panel.key for panel in panels or []}) < len(panels or []):
        raise ValueError(f"two panels share a key: {', '.join(panel.key for panel in panels or [])}")
    wanted |= {panel.key: panel for panel in panels or []}
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write(beside, title, verdict, facts, table, list(wanted.values()), examples, answers or [])
        beside.chmod(0o755)
        _replace(directory, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return directory


def standard_panels(table: pd.DataFrame, history: pd.DataFrame | None = None) -> list[Panel]:
    """What every report shows: the training curves, Δnorm, Latent Scaling and the shares of the difference."""
    curves = Panel(
        "training",
        "Training",
        "How the crosscoder came to be: if these curves have not settled, nothing below can be trusted.",
    )
    norms = Panel(
        "delta-norm",
        "Which model holds each latent",
        "Δnorm compares the norms of a latent's two decoder directions. Most of a fine-tune is shared; what it added stands at the right.",
    )
    scaling = Panel(
        "latent-scaling",
        "Is it really new?",
        "A latent may look tuned-only because the base model's copy was shrunk away (high ν of the error) or is written by other "
        "latents (high ν of the reconstruction). Only the lower left corner survives both.",
    )
    shares = Panel(
        "difference",
        "What carries the difference",
        "The latents that explain most of the difference between the two models' activations.",
    )
    drawn = [curves.drawn(lambda: plots.training_curves(history))] if history is not None else []
    drawn += [
        norms.drawn(lambda: plots.delta_norm_histogram(table)),
        scaling.drawn(lambda: plots.nu_scatter(table)),
    ]
    return [*drawn, shares.drawn(lambda: plots.difference_share_bars(table))]


def _check(
    directory: Path, verdict: list[str], table: pd.DataFrame, examples: Mapping[int, list[Example]]
) -> None:
    if not verdict:
        raise ValueError("a report opens with its verdict; got no sentence")
    if not table.index.is_unique:
        raise ValueError(
            f"the table has latent {table.index[table.index.duplicated()][0]} twice; its index names the latents"
        )
    if absent := [latent for latent in examples if latent not in table.index]:
        raise ValueError(
            f"examples for latent {absent[0]}, which is not among the {len(table)} latents of the table"
        )
    if (
        directory.exists()
        and not (directory / MARKER).is_file()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise FileExistsError(
            f"{directory} exists and is not a report (it has no {MARKER}); name another directory or remove it"
        )


def _replace(directory: Path, beside: Path) -> None:
    """Put ``beside`` in the place of ``directory``; if that fails, the old report is back where it was."""
    old = beside.with_name(beside.name + ".old")
    if directory.exists():
        directory.rename(old)
    try:
        beside.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(
    root: Path,
    title: str,
    verdict: list[str],
    facts: dict[str, str],
    table: pd.DataFrame,
    panels: list[Panel],
    examples: dict[int, list[Example]],
    answers: list[dict[str, str]],
) -> None:
    for name in ("assets", "data", "latents"):
        (root / name).mkdir()
    render = _renderer()
    for name in ("style.css", "report.js"):
        _put(root / "assets" / name, (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))
    pages = [int(latent) for latent in examples]
    scripts = write_table(
        root / "data", table, pages, {latent: _strongest(examples[latent]) for latent in examples}
    )
    shared = {
        "title": title,
        "policy": POLICY,
        "numbers": [column(name) for name in COLUMNS if name in table],
    }
    shown = [_panel(root, panel) for panel in panels]
    gallery = [_entry(latent, table, examples[latent]) for latent in pages[:GALLERY]]
    groups = _answers(answers)
    index = {
        "verdict": verdict,
        "facts": facts,
        "panels": shown,
        "gallery": gallery,
        "pages": pages,
        "answers": groups,
    }
    _put(root / "index.html", render("index.html", scripts=scripts, rows=len(table), **index, **shared))
    neighbours = dict(zip(pages, zip([None, *pages], [*pages[1:], None], strict=False), strict=True))
    for latent, (before, after) in neighbours.items():
        page = _latent(latent, table, examples[latent]) | {
            "previous": before,
            "next": after,
            "place": pages.index(latent) + 1,
        }
        _put(root / "latents" / f"{latent}.html", render("latent.html", count=len(pages), **page, **shared))
    _put(
        root / MARKER,
        json.dumps({"format": FORMAT, "title": title, "latents": len(table), "pages": len(pages)}, indent=1)
        + "\n",
    )


def _renderer() -> Any:
    """``render(template, **values)``: everything escaped, invisible characters spelled out, unknown names an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def show(value: object) -> object:
        return (
            value if hasattr(value, "__html__") else visible(value if isinstance(value, str) else cell(value))
        )

    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=show,
    )
    environment.filters["cell"] = cell
    return lambda name, **values: environment.get_template(name).render(**values)


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _panel(root: Path, panel: Panel) -> dict[str, Any]:
    """A panel as the template wants it; its figure and table also lie in the folder as files."""
    from markupsafe import Markup

    shown: dict[str, Any] = {"key": panel.key, "title": panel.title, "text": panel.text, "notes": panel.notes}
    shown |= {"figure": None, "svg": None, "table": None, "csv": None}
    if panel.figure is not None:
        drawing = inline(panel.figure, panel.key, panel.title)
        _put(root / "assets" / f"{panel.key}.svg", drawing)
        shown |= {"figure": Markup(drawing), "svg": f"assets/{panel.key}.svg"}
    if panel.table is not None:
        write_csv(root / "data" / f"{panel.key}.csv", panel.table)
        rows = panel.table if isinstance(panel.table.index, pd.RangeIndex) else panel.table.reset_index()
        numeric = [pd.api.types.is_numeric_dtype(rows[name]) for name in rows]
        cells = [
            list(zip(row, numeric, strict=True)) for row in rows.head(TABLE_ROWS).itertuples(index=False)
        ]
        heads = list(zip(map(str, rows), numeric, strict=True))
        shown |= {
            "csv": f"data/{panel.key}.csv",
            "table": {"heads": heads, "rows": cells, "left": max(len(rows) - TABLE_ROWS, 0)},
        }
    return shown


def _answers(answers: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Behaviour by behaviour, the prompts and, for each, the answer under every condition."""
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for row in answers:
        groups.setdefault(row["behaviour"], {}).setdefault(row["prompt"], {})[row["condition"]] = row[
            "answer"
        ]
    found = []
    for behaviour, prompts in groups.items():
        conditions = list(
            dict.fromkeys(condition for by_condition in prompts.values() for condition in by_condition)
        )
        found.append({"behaviour": behaviour, "conditions": conditions, "prompts": prompts})
    return found


def _strongest(examples: list[Example], most: int = 4) -> list[str]:
    """The distinct tokens at the peaks of the examples, in order."""
    return list(dict.fromkeys(example.tokens[example.peak] for example in examples if example.tokens))[:most]


def _entry(latent: int, table: pd.DataFrame, examples: list[Example]) -> dict[str, Any]:
    """One line of the gallery: the latent, its numbers, and its strongest passage around the peak."""
    row = table.loc[latent]
    entry: dict[str, Any] = {
        "latent": latent,
        "class": class_key(row.get("class", "")),
        "before": "",
        "peak": "",
        "after": "",
    }
    entry["delta_norm"] = _shown(row, "delta_norm")
    if examples and examples[0].tokens:
        tokens, peak = examples[0].tokens, examples[0].peak
        parts = (
            tokens[max(0, peak - SNIPPET) : peak],
            tokens[peak : peak + 1],
            tokens[peak + 1 : peak + 1 + SNIPPET],
        )
        entry |= {
            name: _line("".join(part)) for name, part in zip(("before", "peak", "after"), parts, strict=True)
        }
    return entry


def _line(text: str) -> str:
    return token_text(text).replace("\n", " ").replace("\t", " ")


def _shown(row: pd.Series, name: str) -> str:
    if name not in row or pd.isna(row[name]):
        return MISSING
    value, spec = row[name], column(name)
    return cell(value) if isinstance(value, str) else number(float(value), spec.digits, spec.scale)


def _latent(latent: int, table: pd.DataFrame, examples: list[Example]) -> dict[str, Any]:
    """What a latent's page shows."""
    row = table.loc[latent]
    numbers = [(column(name), _shown(row, name)) for name in COLUMNS if name in table and name != "class"]
    others = [
        (str(name).replace("_", " "), row[name]) for name in table if name not in COLUMNS and name != "dead"
    ]
    norms = [float(row.get(name, math.nan)) for name in ("norm_base", "norm_tuned")]
    written = [
        value
        for example in examples
        for value in (*example.written_base, *example.written_tuned)
        if value == value
    ]
    scale = max(written, default=0.0)
    bars = (
        [100 * norm / max(norms) if max(norms) > 0 else 0 for norm in norms]
        if all(map(math.isfinite, norms))
        else None
    )
    shown = [_example(example, scale) for example in examples]
    page = {
        "latent": latent,
        "class": class_key(row.get("class", "")),
        "values": numbers,
        "others": others,
        "bars": bars,
    }
    return page | {"examples": shown, "scale": number(scale), "shades": SHADES, "strength": _strength(row)}


def _strength(row: pd.Series) -> str:
    largest = row.get("max_act", math.nan)
    return f"{float(largest):.3g}" if pd.notna(largest) and math.isfinite(largest) else "5.0"


def _example(example: Example, scale: float) -> dict[str, Any]:
    """Both columns of one example as runs: plain text, or one active token with its shade and its numbers."""
    acts = example.acts
    active = [
        act > 0 or base > 0 or tuned > 0
        for act, base, tuned in zip(acts, example.written_base, example.written_tuned, strict=True)
    ]
    edges = [
        0,
        *(edge for place in range(len(acts)) if active[place] for edge in (place, place + 1)),
        len(acts),
    ]
    columns = []
    for written in (example.written_base, example.written_tuned):
        runs = []
        for start, stop in pairwise(edges):
            if start < stop:
                text = token_text("".join(example.tokens[start:stop])) or "∅"
                lit = active[start]
                runs.append(
                    (
                        text,
                        _shade(written[start], scale) if lit else None,
                        _numbers(example, start) if lit else "",
                    )
                )
        columns.append(runs)
    peak = number(acts[example.peak]) if acts else MISSING
    return {
        "source": example.source,
        "sequence": example.sequence,
        "peak": peak,
        "base": columns[0],
        "tuned": columns[1],
    }


def _shade(written: float, scale: float) -> int:
    return math.ceil(SHADES * written / scale) if scale > 0 and written > 0 else 0


def _numbers(example: Example, place: int) -> str:
    text = (
        f"activation {number(example.acts[place])} · writes {number(example.written_base[place])} into base, "
    )
    text += f"{number(example.written_tuned[place])} into tuned"
    if example.drive_base is not None and example.drive_tuned is not None:
        text += f" · driven {number(example.drive_base[place])} by base, {number(example.drive_tuned[place])} by tuned"
    return text
