"""Text that came from models and data, made safe to print and possible to see."""

import math
import re
from typing import Any

import numpy as np
import pandas as pd

# Controls (C0, C1, DEL), directional formatting, zero-width and line separators, lone surrogates: they hide, reorder or break text.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
MISSING = "–"


def visible(text: str) -> str:
    """``text`` with every invisible or reordering character spelled out as ``⟨U+202E⟩``; newline and tab stay."""
    return INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def token_text(token: str) -> str:
    """A token as it is shown: ``↵`` marks a newline, which still breaks the line once, and ``⇥`` a tab."""
    shown = visible(token.replace("\r\n", "\n"))
    shown = re.sub(r"\n+", lambda run: "↵" * len(run[0]) + "\n", shown)
    return shown.replace("\t", "⇥\t")


def number(value: object, digits: int | None = None, scale: int = 1) -> str:
    """A number as people read it; ``–`` where there is none.  ``digits`` fixes the decimals, otherwise three figures are shown."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING if value is None or math.isnan(value) else ("∞" if value > 0 else "−∞")
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    size = float(str(value)) * scale
    digits = 0 if digits is None and abs(size) >= 1000 else digits
    text = f"{size:.3g}" if digits is None else f"{size:,.{digits}f}"
    return text.replace("-", "−")


def cell(value: object) -> str:
    """Anything a data frame may hold, as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_missing(value):
        return MISSING
    return number(value) if isinstance(value, int | float) else str(value)


def is_missing(value: Any) -> bool:
    """None, NaN, NA or NaT."""
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))
