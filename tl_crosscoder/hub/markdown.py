"""Words and figures as Markdown: nothing that comes from models, data or users is more than text there."""

import re

from tl_crosscoder.figures.text import number, visible
from tl_crosscoder.hub.source import is_repo


def plain(value: object) -> str:
    """Text from models, data or users as Markdown shows it: letter by letter, on one line, in one cell of a table."""
    text = re.sub(r"\s+", " ", visible(str(value))).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)


def code(value: object) -> str:
    """The same in code type, for names."""
    text = re.sub(r"\s+", " ", visible(str(value))).strip().replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else "–"


def link(name: object) -> str:
    text = str(name or "")
    return (
        f"[{plain(text)}](https://huggingface.co/{text})" if is_repo(text) else code(text or "not recorded")
    )


def share(value: float | int | None) -> str:
    """A part of a whole in percent."""
    percent = None if value is None else round(100 * value, 1) + 0.0  # no -0.0
    return number(percent, 1) + ("" if percent is None or percent != percent else "%")


def said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
