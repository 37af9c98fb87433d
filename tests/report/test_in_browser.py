"""What only a browser can tell.  Needs Chromium; opens files only."""

import re
import shutil
import subprocess

import pandas as pd
import pytest
from report_data import HOSTILE, Page, inputs, latent_table, passage

from tl_crosscoder.figures.text import visible
from tl_crosscoder.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    table = latent_table(300)
    table["label"] = pd.Series((HOSTILE * 19)[:300], dtype=object)
    examples = {3: [passage(HOSTILE, {0: 1.0, 3: 2.0})]}
    return write_report(
        tmp_path_factory.mktemp("browser") / "report", **inputs(table=table, examples=examples)
    )


@pytest.fixture
def opened(report, tmp_path):
    """``opened("index.html#...")``: the page after its scripts have run, with every complaint on the console an error."""

    def opened(address):
        quiet = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --enable-logging=stderr"
        arguments = [
            *quiet.split(),
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=3000",
            "--dump-dom",
        ]
        command = [str(CHROMIUM), *arguments, f"file://{report}/{address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return opened


def cells(dom, column):
    body = re.search(r'<table id="table".*?<tbody>(.*?)</tbody>', dom, re.S)
    assert body
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in body[1].split("<tr>")[1:]]
    return [Page(row[column]).text for row in rows]


def test_the_table_opens_from_disk_in_the_order_given(opened):
    dom = opened("index.html")
    assert cells(dom, 0) == [str(latent) for latent in range(50)]
    assert "300 latents" in Page(dom).text


def test_the_address_sorts_filters_and_turns_the_page(opened):
    dom = opened("index.html#sort=-delta_norm&class=shared&q=delta_norm%3E0.49&page=2")
    table = latent_table(300)
    chosen = table[(table["class"] == "shared") & (table["delta_norm"] > 0.49)].sort_values(
        "delta_norm", ascending=False
    )
    assert cells(dom, 0) == [str(latent) for latent in chosen.index[50:100]]
    assert f"{len(chosen)} of 300 latents" in Page(dom).text
    assert [found["data-key"] for tag, found in Page(dom).tags if found.get("aria-sort") == "descending"] == [
        "delta_norm"
    ]


def test_hostile_text_is_text_in_the_table_and_on_the_page_of_a_latent(opened):
    dom = opened("index.html#q=latent%3C16")
    labels = [column for column in zip(*[cells(dom, place) for place in range(13, 15)], strict=True)]
    shown = {text for row in labels for text in row}
    for given in HOSTILE:
        assert visible(given).replace("\n", "↵") in shown
    for address in ("index.html", "latents/3.html"):
        tags = {tag for tag, _ in Page(opened(address)).tags}
        assert not tags & {"img", "b2", "iframe"}
        assert "alert(1)" in Page(opened(address)).text
