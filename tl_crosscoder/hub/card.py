"""The model card: metadata that the Hub reads, and a page that a person reads, both from what the run measured."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.figures.text import visible
from tl_crosscoder.hub import sections
from tl_crosscoder.hub.markdown import plain
from tl_crosscoder.hub.study import Study

TAGS = ["tl-crosscoder", "crosscoder", "model-diffing", "sparse-autoencoder", "mechanistic-interpretability"]
#: The Hub takes a list of base models for a merge unless told otherwise; a dictionary is an addition to both.
RELATION = "adapter"
SNIPPET = """import torch
import tl_crosscoder as tlc

crosscoder = tlc.from_pretrained("{repo}")
x = torch.randn(8, {n_models}, {d_in})  # raw activations [batch, model, d_in], such as pair.capture(...) gives
acts = crosscoder.encode(x)  # [batch, d_sae], d_sae = {d_sae}
recon = crosscoder.decode(acts)  # [batch, model, d_in]"""
SAE_LENS = "sae_lens"
SAE_LENS_SNIPPET = """from sae_lens import SAE

sae = SAE.from_pretrained("{repo}", "sae_lens")"""


def card(
    repo: str,
    crosscoder: Crosscoder,
    study: Study,
    paths: Sequence[str],
    pictures: Sequence[tuple[str, str]] = (),
    *,
    license: str | None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
) -> str:
    """The whole README.md; ``paths`` are the files that are published with it, ``pictures`` what some of them show, and where."""
    from huggingface_hub import ModelCardData

    results = _results(study, datasets)
    data = ModelCardData(
        license=license,
        library_name="tl-crosscoder",
        tags=[*TAGS, *(["transformer-lens"] if "hook" in study.pair else [])],
        base_model=study.base_models() or None,
        base_model_relation=RELATION if study.base_models() else None,
        datasets=list(datasets) or None,
        language=list(language) or None,
        model_name=repo.split("/")[1] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(repo, crosscoder, study, paths, pictures)}"


def _body(
    repo: str,
    crosscoder: Crosscoder,
    study: Study,
    paths: Sequence[str],
    pictures: Sequence[tuple[str, str]],
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=False,  # it is Markdown: every word from outside has gone through plain() or code()
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sizes = {"n_models": crosscoder.n_models, "d_in": crosscoder.d_in, "d_sae": crosscoder.d_sae}
    verdict = [plain(sentence) for sentence in study.metrics.get("verdict") or []]
    content = {
        "repo": repo,
        "title": plain(study.metrics.get("title") or repo.split("/")[1]),
        "headline": verdict[0] if verdict else "",
        "snippet": SNIPPET.format(repo=repo, **sizes),
        "sae_lens_snippet": SAE_LENS_SNIPPET.format(repo=repo)
        if any(path.startswith(f"{SAE_LENS}/") for path in paths)
        else "",
        "compared": sections.compared(study),
        "place": sections.place(study),
        "dictionary": sections.dictionary(crosscoder),
        "recipe": sections.recipe(study),
        "tokens": f"{int(study.validation.get('tokens', 0)):,}",
        "validation": sections.validation(study),
        "classes": sections.classes(study.table),
        "gated": sections.gated(study.table),
        "found": verdict[1:],
        "asked": [
            (plain(name.replace("-", " ")), [plain(sentence) for sentence in verdict])
            for name, verdict in study.asked.items()
        ],
        "studies": sections.studies(study.metrics),
        "pictures": [(plain(shows), path) for shows, path in pictures],
        "limits": sections.limits(study),
        "files": sections.files(paths),
    }
    return environment.get_template("card.md").render(content).rstrip() + "\n"


def _results(study: Study, datasets: Sequence[str]) -> list[Any]:
    """The figures as the Hub's evaluation results."""
    from huggingface_hub import EvalResult

    figures = {key: (name, study.validation[key]) for key, (name, _) in sections.measured(study).items()}
    if (gated := sections.n_gated(study.table)) is not None:
        figures["tuned_specific"] = "latents that pass both gates of Latent Scaling", gated
    for name, part in (study.metrics.get("substitution") or {}).items():
        for row in part.get("table") or []:
            if (
                row.get("tokens") == "all"
                and row.get("condition") == "all"
                and row.get("recovered") is not None
            ):
                said = f"change of predictions that all latents win back, {visible(str(name))}"
                figures[f"recovered_{re.sub('[^a-z0-9]+', '_', str(name).lower())}"] = said, row["recovered"]
    return [
        EvalResult(
            task_type="model-diffing",
            task_name="Model diffing",
            dataset_type=datasets[0] if datasets else "held-out",
            dataset_name=f"{int(study.validation.get('tokens', 0)):,} held-out tokens",
            metric_type=key,
            metric_name=name,
            metric_value=round(float(value), 6),
        )
        for key, (name, value) in figures.items()
    ]
