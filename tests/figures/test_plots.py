import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from tests.report.report_data import HOSTILE, latent_table
from tl_crosscoder.diffing.verdict import verdict
from tl_crosscoder.figures import NotDrawn, plots
from tl_crosscoder.gates import NU_HIGH, NU_LOW, tuned_specific

KL = pd.DataFrame({"condition": ["none", "top", "random"] * 2, "tokens": ["all"] * 3 + ["first 9"] * 3})
KL = KL.assign(kl=[1, 0.5, 0.9, 3, 1, 2.5], ci_low=0.4, ci_high=[1.2, 0.6, np.nan, 3.5, 1.2, 2.8])
RATES = pd.DataFrame(
    {"behaviour": ["a", "a", "b"], "condition": ["base", "tuned", "tuned"], "rate": [0.25, 0.75, 1]}
)
HISTORY = pd.DataFrame(
    {"step": [0, 10, 20], "loss": [3.0, 2.0, 1.0], "fve_base": [0.1, np.nan, 0.9], "l0": [9, 8, 7]}
)

FIGURES = {
    "curves": lambda: plots.training_curves(HISTORY).svg(),
    "histogram": lambda: plots.delta_norm_histogram(latent_table()).svg(),
    "scatter": lambda: plots.nu_scatter(latent_table()).svg(),
    "kl": lambda: plots.kl_bars(KL).svg(),
    "rates": lambda: plots.behaviour_bars(RATES).svg(),
    "shares": lambda: plots.difference_share_bars(latent_table()).svg(),
}


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_svg_with_the_same_bytes_every_time(name):
    svg = FIGURES[name]()
    assert svg == FIGURES[name]()
    assert ElementTree.fromstring(svg).tag.endswith("svg") and not re.search(r"20\d\d-\d\d-\d\d", svg)


def test_the_histogram_counts_the_living_latents_of_each_class():
    # Rows 0..59 cycle through shared ×3, tuned_only, other, base_only; row 59 would be base-only but is dead.
    shown = texts(FIGURES["histogram"]())
    counts = {name: shown[shown.index(name) + 1] for name in ("shared", "tuned-only", "base-only")}
    assert counts == {"shared": "30", "tuned-only": "10", "base-only": "9"}
    assert "passes both ν gates: 10" in shown


def test_the_scatter_draws_every_gated_latent_and_says_how_many_others_it_left_out(monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 20)
    svg = FIGURES["scatter"]()
    # 59 living latents: 10 gated (nu = .02 to .1), 9 base-only at nu = 1.9 to 1.98, all within the range.
    assert "20 of 59 latents drawn, among them all that pass both gates" in texts(svg)
    assert "passes both: 10" in texts(svg)


def test_a_value_outside_the_gates_does_not_pass_them():
    table = latent_table(6).assign(
        nu_error=[0.1, 0.1, 0.2, -0.2, np.nan, 0.1], nu_recon=[0.4, 0.5, 0.1, 0.1, 0.1, np.nan]
    )
    assert "passes both: 1" in texts(plots.nu_scatter(table).svg())


def test_the_pictures_count_what_the_verdict_counts():
    """A latent that fired on a few tokens only passes neither there nor here."""
    table = latent_table(4).assign(
        nu_error=[0.1, -0.15, 0.1, 0.1],
        nu_recon=0.1,
        n_fired=[100, 100, 99, 2000],
        dead=False,
        **{"class": "shared"},
    )
    assert tuned_specific(table).tolist() == [True, True, False, True]
    shown = texts(plots.nu_scatter(table).svg())
    assert "passes both: 3" in shown
    assert "rings: fired on fewer than 100 tokens, not counted (1 would pass)" in shown
    table.attrs["metrics"] = dict.fromkeys(("fve_base", "fve_tuned", "fve_difference", "l0", "tokens"), 1)
    assert "gates let 3 pass (1 more fired on fewer than 100 tokens" in verdict(table, {}, None)[1]
    assert "passes both ν gates: 3" in texts(plots.delta_norm_histogram(table).svg())


def test_bars_are_labelled_with_their_values_and_a_missing_one_with_a_dash():
    shown = texts(FIGURES["kl"]())
    assert shown.count("0.5") >= 1 and "all tokens" in shown and "first 9 tokens" in shown
    rates = texts(FIGURES["rates"]())
    assert "75" in rates and "25" in rates and "–" in rates  # behaviour b was not asked of the base model


def test_a_panel_with_nothing_to_count_says_so():
    table = KL.assign(kl=[1, 0.5, 0.9, np.nan, np.nan, np.nan])
    shown = texts(plots.kl_bars(table).svg())
    assert shown.count("nothing to count") == 1 and not [text for text in shown if "1e" in text]


def test_the_brush_attributes_place_the_values_of_the_axes_in_the_drawing():
    svg = FIGURES["scatter"]()
    name, start, stop, low, high = ElementTree.fromstring(svg).attrib["data-x"].split()
    assert (name, float(low), float(high)) == ("nu_recon", NU_LOW, NU_HIGH)
    # The dashed gate at nu_recon = .5 lies where the attributes say it does.
    gate = float(start) + (0.5 - float(low)) / (float(high) - float(low)) * (float(stop) - float(start))
    lines = re.findall(r'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \n"[^>]*stroke-dasharray', svg)
    assert any(x == y and abs(float(x) - gate) < 0.1 for x, y in lines)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (
            lambda: plots.nu_scatter(latent_table().drop(columns=["nu_error", "nu_recon"])),
            "nu_error or nu_recon",
        ),
        (lambda: plots.nu_scatter(latent_table().assign(nu_error=9.0)), "within -0.1 and 2.0"),
        (lambda: plots.delta_norm_histogram(latent_table().iloc[:0]), "no rows"),
        (
            lambda: plots.delta_norm_histogram(latent_table().assign(delta_norm=np.nan)),
            "delta_norm has no value",
        ),
        (lambda: plots.training_curves(pd.DataFrame({"lr": [1.0]})), "loss, fve, l0 or dead"),
        (lambda: plots.training_curves(pd.DataFrame()), "loss, fve, l0 or dead"),
        (lambda: plots.kl_bars(KL.drop(columns="tokens")), "no column tokens"),
        (lambda: plots.difference_share_bars(latent_table().assign(**{"class": "dead"})), "no living latent"),
    ],
)
def test_a_figure_without_its_data_says_what_is_missing(draw, words):
    with pytest.raises(NotDrawn, match=words):
        draw()


def test_labels_are_text_and_never_mathematics_or_markup():
    rates = pd.DataFrame({"behaviour": "b", "condition": pd.Series(HOSTILE, dtype=object), "rate": 0.5})
    shown = texts(plots.behaviour_bars(rates).svg())
    assert (
        "$\\frac{1}$" in shown and "</script><img src=x onerror=alert(1)>" in shown and "日本語 🙂" in shown
    )


def test_dead_may_be_missing_for_some_latents():
    shown = texts(plots.delta_norm_histogram(latent_table().assign(dead=[True, None] * 30)).svg())
    # Rows 0, 1, 2 of every 6 are shared, and the even rows are dead.
    assert shown[shown.index("shared") + 1] == "10"


def test_a_drawing_is_shown_saved_and_changed_by_hand(tmp_path):
    drawing = plots.kl_bars(KL)
    assert drawing._repr_svg_() == drawing.svg()
    assert "0x" not in repr(drawing), "an executed notebook would differ with every run"
    assert len(drawing.figure().axes) == 2
    assert drawing.save(tmp_path / "new" / "kl.svg").read_text(encoding="utf-8") == drawing.svg()
    assert drawing.save(tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert (
        drawing.save(tmp_path / "kl.pdf").read_bytes()
        == plots.kl_bars(KL).save(tmp_path / "2.pdf").read_bytes()
    )
