"""The report: one folder that opens from disk, without a server or a network, in any browser."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_crosscoder.figures.columns import COLUMNS, column
from tl_crosscoder.figures.panel import Panel, standard_panels
from tl_crosscoder.figures.text import cell, visible
from tl_crosscoder.report.example import Example
from tl_crosscoder.report.pages import (
    answer_groups,
    gallery_entry,
    latent_page,
    panel_section,
    strongest_tokens,
)
from tl_crosscoder.report.shards import write_table

FORMAT, MARKER = 1, "report.json"
GALLERY = 24
TEMPLATES = Path(__file__).parent / "templates"
#: No inline script or style, and nothing from elsewhere; 'self' is the folder, also under file://.
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
    answers: list[dict[str, Any]] | None = None,
) -> Path:
    """The folder that was written, whose ``index.html`` is the report; a report that was there is replaced as a whole.

    ``verdict`` is read first: a headline and the sentences that qualify it.  ``table`` has one row a latent, best first, and is
    shown with whichever known columns it has.  ``panels`` follow the standard ones, or replace those whose key they share.
    ``examples`` gives latents a page of their own, in this order.  ``answers`` are rows of behaviour, prompt, condition and
    answer, and optionally whether the behaviour was ``shown``.  The same arguments give the same bytes.

    Raises ValueError for no verdict, a latent twice in the table, a page for a latent that is not in it, two panels with one key;
    FileExistsError for a directory that holds something else than a report.
    """
    directory, panels, examples = Path(directory).resolve(), panels or [], examples or {}
    _check(directory, verdict, table, panels, examples)
    shown = {panel.key: panel for panel in [*standard_panels(table, history), *panels]}
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        opening = {
            "title": title,
            "verdict": verdict,
            "facts": facts,
            "answers": answer_groups(answers or []),
        }
        _write(beside, opening, list(shown.values()), table, examples)
        beside.chmod(0o755)
        _replace(directory, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return directory


def _check(
    directory: Path,
    verdict: list[str],
    table: pd.DataFrame,
    panels: list[Panel],
    examples: Mapping[int, list[Example]],
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
    keys = [panel.key for panel in panels]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"two panels have the key {twice[0]!r}, which names their files")
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
    opening: dict[str, Any],
    panels: list[Panel],
    table: pd.DataFrame,
    examples: dict[int, list[Example]],
) -> None:
    for name in ("assets", "data", "latents"):
        (root / name).mkdir()
    for name in ("style.css", "report.js"):
        shutil.copyfile(TEMPLATES / name, root / "assets" / name)
    render, pages = _renderer(), list(examples)
    tokens = {latent: strongest_tokens(found) for latent, found in examples.items()}
    shared = opening | {
        "policy": POLICY,
        "columns": [column(name) for name in COLUMNS if name in table],
        "pages": pages,
        "rows": len(table),
        "scripts": write_table(root / "data", table, pages, tokens),
    }
    sections = [panel_section(root, panel) for panel in panels]
    gallery = [gallery_entry(latent, table.loc[latent], examples[latent]) for latent in pages[:GALLERY]]
    _put(root / "index.html", render("index.html", panels=sections, gallery=gallery, **shared))
    for place, latent in enumerate(pages):
        around = {
            "place": place + 1,
            "before": pages[place - 1] if place else None,
            "after": (*pages, None)[place + 1],
        }
        page = latent_page(latent, table.loc[latent], examples[latent])
        _put(root / "latents" / f"{latent}.html", render("latent.html", **page, **around, **shared))
    _put(
        root / MARKER,
        json.dumps({"format": FORMAT, "latents": len(table), "pages": len(pages)}, indent=1) + "\n",
    )


def _renderer() -> Any:
    """``render(template, **values)``: everything escaped, invisible characters spelled out, unknown names an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def show(value: object) -> object:
        return (
            value if hasattr(value, "__html__") else visible(value if isinstance(value, str) else cell(value))
        )

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=show,
    )
    return lambda name, **values: environment.get_template(name).render(**values)


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
