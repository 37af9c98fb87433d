"""Small made-up results, and what is needed to look at a written report without a browser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd

from tl_crosscoder.figures import Panel
from tl_crosscoder.report import Example

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</p></mark><script>alert(1)</script>",
    "<!--",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;&amp;",
    "\u202ereversed\u2066",
    "nul\x00bell\x07",
    "line\u2028para\u2029",
    "\ud800lone surrogate",
    "=HYPERLINK(1)",
    "$\\frac{1}$",
    "עברית",
    "日本語 🙂",
]


def latent_table(rows: int = 60, seed: int = 0) -> pd.DataFrame:
    """Two thirds shared, the rest tuned-only, base-only, other and dead; NaN where a dead latent has no value."""
    rng = np.random.default_rng(seed)
    classes = np.array(["shared", "shared", "shared", "tuned_only", "other", "base_only"])[
        np.arange(rows) % 6
    ]
    centre = {"shared": 0.5, "tuned_only": 0.97, "base_only": 0.03, "other": 0.75}
    delta = np.array([centre[name] for name in classes]) + rng.uniform(-0.02, 0.02, rows)
    table = pd.DataFrame(
        {
            "norm_base": np.minimum(1, 2 - 2 * delta),
            "norm_tuned": np.minimum(1, 2 * delta),
            "delta_norm": delta,
            "cosine": rng.uniform(-1, 1, rows),
            "frequency": rng.uniform(0, 0.01, rows),
            "max_act": rng.uniform(1, 9, rows),
            "difference_share": rng.uniform(0, 1, rows) / rows,
            "difference_peak": rng.uniform(0, 5, rows),
            "nu_error": 2 - 2 * delta,
            "nu_recon": 2 - 2 * delta,
            "rank_score": rng.uniform(0, 1, rows),
            "class": classes,
        },
        index=pd.RangeIndex(rows, name="latent"),
    )
    table.loc[rows - 1, ["cosine", "max_act", "nu_error", "nu_recon"]] = np.nan
    table.loc[rows - 1, "class"] = "dead"
    return table


def passage(tokens: list[str], active: dict[int, float], source: str = "chats") -> Example:
    """An example whose latent writes a tenth of its activation into the base model and twice it into the tuned one."""
    acts = [active.get(place, 0.0) for place in range(len(tokens))]
    return Example(source, 7, tokens, acts, [act / 10 for act in acts], [act * 2 for act in acts])


def inputs(**changes) -> dict:
    """Everything that ``write_report`` takes."""
    steps = np.arange(0, 500, 10)
    history = pd.DataFrame(
        {"loss": 1 / (1 + steps), "fve_base": steps / 600.0, "fve_tuned": steps / 700.0}, index=steps
    )
    rates = pd.DataFrame({"behaviour": ["rhymes"] * 2, "condition": ["base", "tuned"], "rate": [0.1, np.nan]})
    answers = [
        {
            "behaviour": "rhymes",
            "prompt": "Say hello.",
            "condition": name,
            "answer": f"Hello from {name}.\nBye.",
        }
        for name in ("base", "tuned")
    ]
    examples = {
        3: [passage(["The", " cat", "\n", " sat"], {1: 4.0, 2: 1.0}), passage(["a", "b"], {0: 2.0})],
        0: [passage(["x", "y"], {1: 1.0})],
        9: [],
    }
    given = {
        "title": "base and tuned",
        "verdict": ["A headline.", "A caveat."],
        "facts": {"base": "some/base", "tuned": "some/tuned"},
        "table": latent_table(),
        "history": history,
        "panels": [Panel("behaviour", "Behaviours", "Rates.", table=rates)],
        "examples": examples,
        "answers": answers,
    }
    return given | changes


def bare(**changes) -> dict:
    """A report without figures, which take most of the time."""
    unplotted = latent_table().drop(columns=["delta_norm", "nu_error", "nu_recon", "difference_share"])
    return inputs(table=unplotted, history=None) | changes


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.tags if attribute in attributes]


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pages_of(report: Path) -> list[Path]:
    return [report / "index.html", *sorted((report / "latents").glob("*.html"))]


def rows_of(report: Path) -> tuple[dict, list[list]]:
    """What the page's script finds: the description of the table, and its columns."""
    described = re.fullmatch(r"window\.TLC_TABLE=(.*);\n", (report / "data" / "table.js").read_text(), re.S)
    assert described
    columns: list[list] = []
    for shard in sorted((report / "data").glob("latents-*.js")):
        found = re.fullmatch(
            r"\(window\.TLC_DATA=window\.TLC_DATA\|\|\[\]\)\.push\((.*)\);\n", shard.read_text(), re.S
        )
        assert found
        part = json.loads(found[1])
        columns = [old + new for old, new in zip(columns, part, strict=True)] if columns else part
    return json.loads(described[1]), columns


def contents(report: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(report)): path.read_bytes()
        for path in sorted(report.rglob("*"))
        if path.is_file()
    }
