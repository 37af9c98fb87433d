"""Text that came from models and data, made safe to print and possible to see."""

import math
import re
import unicodedata

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
    if digits is None:
        text = f"{size:,.0f}" if abs(size) >= 1000 else f"{size:.3g}"
    else:
        text = f"{size:,.{digits}f}"
    return "0" if size == 0 and digits is None else text.replace("-", "−")


def cell(value: object) -> str:
    """Anything a data frame may hold, as text."""
    import numpy as np
    import pandas as pd

    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or value is pd.NaT:
        return MISSING
    return number(value) if isinstance(value, int | float) else str(value)


def is_invisible(token: str) -> bool:
    """Whether nothing of ``token`` would be seen in print."""
    return all(unicodedata.category(character) in {"Zs", "Cf", "Mn"} for character in token)
