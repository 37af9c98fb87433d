import stat

import numpy as np
import pandas as pd
import pytest
import torch
from report_data import bare, contents, inputs, latent_table, page, pages_of, passage, rows_of

import tl_crosscoder as tlc
from tl_crosscoder.figures import Panel
from tl_crosscoder.report import Example, write_report


def names_in(directory):
    return [path.name for path in directory.iterdir()]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("written") / "report", **inputs())


def test_every_link_leads_to_a_file_or_an_anchor_of_the_folder(report):
    assert len(pages_of(report)) == 4  # the index and latents 3, 0 and 9
    for path in pages_of(report):
        found = page(path)
        anchors = set(found.values("id"))
        assert len(anchors) == len(found.values("id")), "an id twice"
        for link in found.values("href") + found.values("src"):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file() and target.is_relative_to(report), f"{link} in {path.name}"
            assert not anchor or anchor in (anchors if not file else set(page(target).values("id"))), link


def test_nothing_is_loaded_from_elsewhere(report):
    for name, data in contents(report).items():
        text = data.decode().replace(
            "http://www.w3.org/2000/svg", ""
        )  # the name of a namespace, never loaded
        assert "://" not in text and "@import" not in text, name
        assert "url(" not in text.replace("url(#", ""), name


def test_the_policy_forbids_inline_scripts_and_styles_and_the_pages_have_none(report):
    for path in pages_of(report):
        found = page(path)
        policies = [
            dict(attributes)["content"] for tag, attributes in found.tags if "http-equiv" in attributes
        ]
        assert len(policies) == 1 and "default-src 'none'" in policies[0] and "unsafe" not in policies[0]
        assert not found.values("style") and "style" not in {tag for tag, _ in found.tags}
        assert all(attributes.get("src") for tag, attributes in found.tags if tag == "script")


def test_the_same_input_gives_the_same_bytes(report, tmp_path):
    assert contents(report) == contents(write_report(tmp_path / "another name", **inputs()))


def test_a_report_is_replaced_as_a_whole(tmp_path):
    report = write_report(tmp_path / "report", **bare())
    assert (report / "latents" / "9.html").exists()
    again = write_report(tmp_path / "report", **bare(examples={}, title="second"))
    assert again == report and "second" in page(report / "index.html").text
    assert not (report / "latents" / "9.html").exists()
    assert names_in(tmp_path) == ["report"]  # nothing beside it


def test_a_report_that_cannot_be_written_leaves_the_old_one_alone(tmp_path):
    report = write_report(tmp_path / "report", **bare())
    before = contents(report)
    with pytest.raises(ValueError, match="not SVG"):
        write_report(report, **bare(panels=[Panel("broken", "Broken", figure="<svg")]))
    assert contents(report) == before and names_in(tmp_path) == ["report"]


def test_a_directory_that_is_not_a_report_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not a report"):
        write_report(tmp_path / "thesis", **bare())
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert (write_report(tmp_path / "empty", **bare()) / "index.html").exists()


def test_others_may_read_the_report(tmp_path):
    report = write_report(tmp_path / "report", **bare())
    assert stat.S_IMODE(report.stat().st_mode) == 0o755


def test_what_does_not_fit_together_is_refused(tmp_path):
    twice = pd.concat([latent_table(6), latent_table(6)])
    for changes, words in [
        ({"verdict": []}, "verdict"),
        ({"table": twice, "examples": {}}, "latent 0 twice"),
        ({"examples": {99: []}}, "latent 99"),
        ({"panels": [Panel("a", "A"), Panel("a", "B")]}, "two panels have the key 'a'"),
    ]:
        with pytest.raises(ValueError, match=words):
            write_report(tmp_path / "report", **bare(**changes))
    with pytest.raises(ValueError, match="hyphens"):
        Panel("../escape", "Escape")
    with pytest.raises(ValueError, match="2 tokens, 1 acts"):
        Example("chats", 0, ["a", "b"], [1.0], [0.0, 0.0], [0.0, 0.0])
    assert names_in(tmp_path) == []


def test_both_columns_of_an_example_carry_the_same_text_and_the_same_scale(report):
    found = page(report / "latents" / "3.html")
    marks = [attributes for tag, attributes in found.tags if tag == "mark" and "title" in attributes]
    # Largest norm written: 8 (tuned, " cat").  Shades of 9: base .4, .1, .2 -> 1, 1, 1; tuned 8, 2, 4 -> 9, 3, 5.
    assert [mark["class"] for mark in marks] == ["w1", "w1", "w9", "w3", "w1", "w5"]
    assert marks[0]["title"] == marks[2]["title"] == "act 4 · writes base 0.4 · tuned 8"
    assert found.text.count("The cat↵\n sat") == 2


def test_the_pages_of_the_latents_follow_each_other_in_the_order_given(report):
    steps = {}
    for latent in (3, 0, 9):
        tags = page(report / "latents" / f"{latent}.html").tags
        steps[latent] = {
            str(values["rel"]): values["href"] for tag, values in tags if tag == "a" and "rel" in values
        }
    assert [steps[latent].get("prev") for latent in (3, 0, 9)] == [None, "3.html", "0.html"]
    assert [steps[latent].get("next") for latent in (3, 0, 9)] == ["0.html", "9.html", None]


def test_the_snippet_of_a_page_runs(report, tmp_path):
    crosscoder = tlc.Crosscoder(4, 10, tlc.ReLU())
    tlc.save(crosscoder, tmp_path / "crosscoder")
    text = page(report / "latents" / "9.html").text
    snippet = text[text.index("import tl_crosscoder") : text.index("Copy as Python")]
    found: dict = {}
    exec(snippet.replace("path/to/crosscoder", str(tmp_path / "crosscoder")), found)
    acts = torch.zeros(1, 1, 4)
    strength = float(f"{latent_table()['max_act'][9]:.3g}")
    torch.testing.assert_close(found["edit"](acts)[0, 0], strength * crosscoder.raw_rows()[9, tlc.TUNED])
    assert found["in_base"].shape == found["in_tuned"].shape == (4,)


def test_a_table_indexed_by_several_columns_keeps_them(tmp_path):
    rates = pd.DataFrame({"behaviour": ["a", "b"], "condition": ["x", "y"], "rate": [0.5, 1.0]})
    panel = Panel("rates", "Rates", table=rates.set_index(["behaviour", "condition"]))
    written = write_report(tmp_path / "report", **bare(panels=[panel]))
    assert (written / "data" / "panel-rates.csv").read_text() == "behaviour,condition,rate\na,x,0.5\nb,y,1\n"


def test_a_missing_value_is_a_dash_on_the_page_and_null_in_the_data(tmp_path):
    last = 59  # dead: no cosine, no max_act
    report = write_report(tmp_path / "report", **bare(examples={last: []}))
    described, columns = rows_of(report)
    place = {column["key"]: i for i, column in enumerate(described["columns"])}
    assert columns[place["cosine"]][last] is None and columns[place["cosine"]][0] is not None
    assert columns[place["class"]][last] == "dead"
    assert "cosine–" in page(report / "latents" / f"{last}.html").text.replace("\n", "")
    assert "tuned–" in page(report / "index.html").text  # the rate of the panel's table


def test_the_data_hold_the_table_to_five_figures(tmp_path):
    table = latent_table(30).drop(columns="nu_error")
    table["label"] = [f"about {i}" for i in range(30)]
    described, columns = rows_of(write_report(tmp_path / "report", **bare(table=table)))
    shown = {column["key"]: values for column, values in zip(described["columns"], columns, strict=True)}
    assert described["rows"] == 30 and described["pages"] == [3, 0, 9]
    assert shown["latent"] == list(range(30)) and shown["label"] == list(table["label"])
    np.testing.assert_allclose(shown["delta_norm"], table["delta_norm"], rtol=1e-4)
    assert shown["tokens"][3] == " cat a" and shown["tokens"][1] is None


def test_a_table_without_columns_gives_a_report_that_says_what_is_missing(tmp_path):
    report = write_report(tmp_path / "report", **bare())
    text = page(report / "index.html").text
    assert "Not drawn: the table has no column delta_norm." in text
    assert "Not drawn: the table has no column nu_error or nu_recon or delta_norm." in text
    assert "Not drawn: the table has no column difference_share." in text
    assert not {"delta_norm", "nu_error"} & {column["key"] for column in rows_of(report)[0]["columns"]}


def test_a_report_needs_only_a_table_and_a_verdict(tmp_path):
    table = pd.DataFrame(index=pd.Index([5, 2], name="latent"))
    report = write_report(tmp_path / "report", title="t", verdict=["v"], facts={}, table=table)
    assert rows_of(report)[1] == [[5, 2]]
    assert pages_of(report) == [report / "index.html"]


def test_a_panel_with_the_key_of_a_standard_one_takes_its_place(tmp_path):
    mine = Panel("latent-scaling", "My own scaling", "Mine.")
    text = page(write_report(tmp_path / "report", **inputs(panels=[mine])) / "index.html").text
    assert "My own scaling" in text and "Is it really new?" not in text
    assert text.index("My own scaling") < text.index("What carries the difference")


def test_a_table_of_twenty_thousand_latents_stays_below_fifteen_megabytes(tmp_path):
    examples = {latent: [passage(["word "] * 40, {20: 5.0, 21: 3.0})] * 16 for latent in range(30)}
    large = latent_table(20_000)
    report = write_report(tmp_path / "report", **inputs(table=large, history=None, examples=examples))
    sizes = {name: len(data) for name, data in contents(report).items()}
    assert sum(sizes.values()) < 15e6
    assert sizes["index.html"] < 1e6
    assert len(rows_of(report)[1][0]) == 20_000
