import csv

import numpy as np
import pandas as pd
import pytest
from report_data import HOSTILE, bare, latent_table, page, pages_of, passage, rows_of

from tl_crosscoder.figures import Panel
from tl_crosscoder.figures.text import visible
from tl_crosscoder.report import write_report
from tl_crosscoder.report.svg import inline


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("plain") / "report", **everywhere(["word"] * len(HOSTILE)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("hostile") / "report", **everywhere(HOSTILE))


def everywhere(texts):
    """A report that has these texts wherever a model, a data set or a person may put text."""
    table = latent_table(len(texts))[["norm_base", "norm_tuned", "cosine", "class"]]
    table["label"] = pd.Series(texts, dtype=object)
    rates = pd.DataFrame({f"kind {texts[0]}": pd.Series(texts, dtype=object)}).assign(
        rate=np.linspace(0, 1, len(texts))
    )
    answers = [
        {"behaviour": t, "prompt": t, "condition": t, "answer": t, "shown": True} for t in texts[:1] * 2
    ]
    answers += [
        {"behaviour": "b", "prompt": "p", "condition": str(i), "answer": t} for i, t in enumerate(texts)
    ]
    return bare(
        title=texts[0],
        verdict=texts,
        facts={f"{i} {text}": text for i, text in enumerate(texts)},
        table=table,
        panels=[Panel("rates", texts[1], texts[2], table=rates, notes=tuple(texts))],
        examples={3: [passage(texts, {i: 1.0 for i in range(0, len(texts), 2)}, source=texts[3])]},
        answers=answers,
    )


def shape(path):
    return [(tag, sorted(attributes)) for tag, attributes in page(path).tags]


def test_hostile_text_adds_no_tag_and_no_attribute(plain, hostile):
    for inert, attacked in zip(pages_of(plain), pages_of(hostile), strict=True):
        assert inert.name == attacked.name and shape(inert) == shape(attacked)


def test_hostile_text_is_read_as_it_is_with_the_invisible_spelled_out(hostile):
    text = page(hostile / "index.html").text
    for given in HOSTILE:
        assert visible(given) in text
    assert "⟨U+202E⟩reversed⟨U+2066⟩" in text and "nul⟨U+0000⟩bell⟨U+0007⟩" in text
    assert not set("\x00\x07\u202e\u2066\u2028") & set((hostile / "index.html").read_text(encoding="utf-8"))


def test_text_in_the_data_scripts_reads_back_unchanged_and_cannot_end_the_script(hostile):
    described, columns = rows_of(hostile)
    label = [column["key"] for column in described["columns"]].index("label")
    assert columns[label] == HOSTILE
    for script in (hostile / "data").glob("*.js"):
        text = script.read_text(encoding="ascii")
        assert not set("<&") & set(text) and "\u2028" not in text


def test_no_text_of_a_csv_starts_a_formula(tmp_path):
    formulas = ["=1+1", "+1", "-1+2", "@SUM(A1)", "\tx", "plain", 'a,b\n"c"']
    table = pd.DataFrame(
        {"=name": formulas, "number": -np.arange(7.0)}, index=pd.Index(formulas, name="@index")
    )
    write_report(tmp_path / "report", **bare(panels=[Panel("rates", "Rates", table=table)]))
    with (tmp_path / "report" / "data" / "panel-rates.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["'@index", "'=name", "number"]
    inert = ["'=1+1", "'+1", "'-1+2", "'@SUM(A1)", "'\tx", "plain", 'a,b\n"c"']
    assert [row[0] for row in rows[1:]] == inert and [row[1] for row in rows[1:]] == inert
    assert [float(row[2]) for row in rows[1:]] == list(-np.arange(7.0))  # numbers keep their sign


def test_a_figure_loses_everything_that_is_not_drawing():
    drawing = inline(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" onload="a()" width="9">'
        '<script>a()</script><foreignObject><b/></foreignObject><image href="x.png"/><a href="javascript:a()"><g/></a>'
        '<use xlink:href="http://x/y#z"/><use xlink:href="#dot"/><g id="dot" style="fill: #2a6fb0; behavior: url(x)"/>'
        '<path fill="url(http://x)" clip-path="url(#clip)" d="M 0 0.123456"/></svg>',
        "panel-x",
        'a "label"',
    )
    assert drawing == (
        '<svg role="img" aria-label="a &quot;label&quot;" xmlns="http://www.w3.org/2000/svg"><use /><use '
        'href="#panel-x-dot" /><g id="panel-x-dot" fill="var(--base, #2a6fb0)" /><path fill="none" '
        'clip-path="url(#panel-x-clip)" d="M 0 0.12" /></svg>'
    )


def test_a_figure_that_is_not_svg_is_refused():
    for text in ("<html/>", "nonsense", '<svg xmlns="http://www.w3.org/2000/svg">'):
        with pytest.raises(ValueError, match="figure of panel 'panel-x'"):
            inline(text, "panel-x", "label")
