"""The latent table as files: scripts that a page may load from ``file://``, where nothing can be fetched, and one CSV."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_crosscoder.figures.columns import COLUMNS, LATENT, Column, class_key, column
from tl_crosscoder.figures.text import is_missing, visible

ROWS_A_SHARD = 10_000
FORMULA_STARTS = tuple("=+-@\t\r")


def script_json(value: Any) -> str:
    """JSON that is safe inside a script and inside HTML, and that reads back as ``value``."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_table(
    directory: Path, table: pd.DataFrame, pages: list[int], tokens: Mapping[int, list[str]]
) -> list[str]:
    """The names of the scripts, in the order in which the page loads them, all written to ``directory`` beside ``latents.csv``.

    ``tokens`` are the strongest tokens of the latents that have a page; they are text like any other column, searchable.
    """
    shown = [name for name in COLUMNS if name in table]
    shown += [name for name in table if name not in COLUMNS and name != "dead" and not is_number(table[name])]
    columns = {"latent": LATENT} | {str(name): column(str(name)) for name in shown}
    if tokens:
        columns["tokens"] = Column(
            "strongest tokens", "The tokens on which the latent is most active, strongest first."
        )
    described = [_description(name, spec, table) for name, spec in columns.items()]
    files = {
        "table.js": f"window.TLC_TABLE={script_json({'rows': len(table), 'columns': described, 'pages': pages})};\n"
    }
    for start in range(0, len(table), ROWS_A_SHARD):
        rows = table.iloc[start : start + ROWS_A_SHARD]
        arrays = [_array([int(latent) for latent in rows.index])] + [_values(rows, name) for name in shown]
        if tokens:
            arrays.append(
                script_json([" ".join(tokens[latent]) if latent in tokens else None for latent in rows.index])
            )
        text = ",\n".join(arrays)
        files[f"latents-{start // ROWS_A_SHARD:03d}.js"] = (
            f"(window.TLC_DATA=window.TLC_DATA||[]).push([\n{text}]);\n"
        )
    for name, text in files.items():
        (directory / name).write_text(text, encoding="ascii", newline="\n")
    write_csv(directory / "latents.csv", table)
    return list(files)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """``table`` as CSV; a text that a spreadsheet would run as a formula is prefixed with an apostrophe."""
    plain = isinstance(table.index, pd.RangeIndex) and table.index.name is None
    safe = table.copy() if plain else table.reset_index()
    for place in range(safe.shape[1]):
        values = safe.iloc[:, place]
        if not is_number(values):
            safe.isetitem(
                place, pd.Series([_inert(value) for value in values], index=safe.index, dtype=object)
            )
    safe.columns = [_inert(str(name)) for name in safe.columns]
    safe.to_csv(
        path,
        index=False,
        float_format="%.7g",
        lineterminator="\n",
        encoding="utf-8",
        errors="backslashreplace",
    )


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def is_number(values: Any) -> bool:
    """Whether a column holds numbers (or booleans)."""
    return pd.api.types.is_numeric_dtype(values)


def _description(name: str, spec: Column, table: pd.DataFrame) -> dict[str, Any]:
    kind = "number" if name == "latent" or (name in table and is_number(table[name])) else "text"
    found = {"key": name, "label": visible(spec.label), "meaning": spec.meaning, "kind": kind}
    return found | ({"digits": spec.digits, "scale": spec.scale} if kind == "number" else {})


def _values(rows: pd.DataFrame, name: str) -> str:
    values = rows[name]
    if is_number(values):
        return _array(values.astype(float).tolist())
    texts = [None if is_missing(value) else str(value) for value in values]
    return script_json([class_key(text) if name == "class" and text is not None else text for text in texts])


def _array(numbers: list[Any]) -> str:
    """A JSON array with five significant figures; what is not finite becomes null."""
    return (
        "["
        + ",".join(
            f"{x:.5g}"
            if isinstance(x, float) and math.isfinite(x)
            else str(x)
            if isinstance(x, int)
            else "null"
            for x in numbers
        )
        + "]"
    )
