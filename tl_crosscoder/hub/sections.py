"""The rows of the card's tables; every cell is finished Markdown."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tl_crosscoder import __version__
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.figures.text import number
from tl_crosscoder.gates import tuned_specific
from tl_crosscoder.hub.first_token import first_token
from tl_crosscoder.hub.markdown import code, link, plain, said, share
from tl_crosscoder.hub.study import Study

Rows = list[tuple[str, ...]]

VALIDATION = {  # figure of the table's metrics -> its name, and whether it is a share
    "l0": ("latents a token (L0)", False),
    "fve": ("variance explained", True),
    "fve_base": ("variance explained, base", True),
    "fve_tuned": ("variance explained, tuned", True),
    "fve_difference": ("variance explained, difference", True),
    "dead_fraction": ("latents never active", True),
}
RECIPE = ("recipe", "steps", "batch_size", "lr", "init_norm", "init_same", "held_out", "ranking", "seed")
FILES = {
    "config.json": "the crosscoder's settings, the models and the hook",
    "model.safetensors": "the weights, their axes named in `config.json`",
    "sae_lens/": "the same crosscoder as SAE-Lens reads it",
    "latents.parquet": "one row a latent",
    "figures/": "the pictures on this page",
    "report/": "the report; open `report/index.html` from a copy on disk",
}
KL = (
    "Base activations put into the tuned model, on {}: KL in nats a token with its 95% interval, and the share of it that the "
    "latents win back (`error`, `random` and `bottom` are the controls)"
)
RATES = "How often the behaviour shows, with its 95% interval (`matched random` and `same firing` are the controls)"


def compared(study: Study) -> Rows:
    base, tuned = study.model("base"), study.model("tuned")
    rows: Rows = [("model", _named(base), _named(tuned))]
    rows += [("commit", *(code(model.get("revision") or "not recorded") for model in (base, tuned)))]
    for name in ("adapter", "class", "dtype", "fingerprint"):
        if base.get(name) or tuned.get(name):
            rows += [(name, *(code(str(model.get(name) or "–")[:40]) for model in (base, tuned)))]
    return rows


def _named(model: dict[str, Any]) -> str:
    adapter = model.get("adapter_name")
    return link(model.get("name")) + (f" + adapter {code(adapter)}" if adapter else "")


def place(study: Study) -> Rows:
    store = study.capture
    left_out = (store.get("dropped") or {}).items()
    versions = [f"{name} {study.pair[name]}" for name in ("transformers", "torch") if name in study.pair]
    rows = [
        ("hook", code(study.pair.get("hook") or "not recorded")),
        ("tokens captured", number(int(store["tokens"])) if "tokens" in store else ""),
        ("tokens left out", ", ".join(f"{number(int(n))} {plain(why)}" for why, n in left_out)),
        ("first token", plain(first_token(store))),
        ("tokenizer", _tokenizer(store)),
        ("captured with", plain(", ".join(versions))),
    ]
    return [(name, value) for name, value in rows if value]


def _tokenizer(store: dict[str, Any]) -> str:
    """Of a tokenizer no commit is known but that of the model it came with; its words are."""
    names = {"tokenizer_sha256": "vocabulary", "chat_template_sha256": "chat template"}
    return ", ".join(f"{what} {code(str(store[key])[:16])}" for key, what in names.items() if store.get(key))


def dictionary(crosscoder: Crosscoder) -> Rows:
    sparsity = crosscoder.config["sparsity"]
    settings = [f"{name}={said(value)}" for name, value in sparsity.items() if name != "name"]
    scales = ", ".join(f"{value:.4g}" for value in crosscoder.normalizer.scale.tolist())
    threshold = getattr(crosscoder.sparsity, "threshold", None)
    folded = crosscoder.config.get("folded")
    rows = [
        ("latents", number(crosscoder.d_sae)),
        ("width", f"{crosscoder.n_models} × {crosscoder.d_in} (models × d_in)"),
        ("sparsity", code(f"{sparsity['name']}({', '.join(settings)})")),
        ("threshold", f"{float(threshold):.4g}" if threshold is not None and threshold.numel() == 1 else ""),
        ("selected by", code(f"code_norm={crosscoder.config['code_norm']}")),
        (
            "normaliser",
            "folded into the weights" if folded else f"(x − mean) · scale, inside; scale {scales}",
        ),
        ("precision", code(str(crosscoder.W_dec.dtype).removeprefix("torch."))),
        ("written by", f"tl-crosscoder {__version__}"),
    ]
    return [(name, value) for name, value in rows if value]


def recipe(study: Study) -> Rows:
    config = study.config
    return [
        (name.replace("_", " "), code(said(config[name]))) for name in RECIPE if config.get(name) is not None
    ]


def measured(study: Study) -> dict[str, tuple[str, bool]]:
    """The figures of VALIDATION that there are."""
    return {
        key: words for key, words in VALIDATION.items() if isinstance(study.validation.get(key), int | float)
    }


def validation(study: Study) -> Rows:
    return [
        (name, (share if is_share else number)(study.validation[key]))
        for key, (name, is_share) in measured(study).items()
    ]


def classes(table: pd.DataFrame | None) -> Rows:
    if table is None or "class" not in table:
        return []
    counts = table["class"].value_counts()
    return [(code(name), number(int(n)), share(n / len(table))) for name, n in counts.items()]


def n_gated(table: pd.DataFrame | None) -> int | None:
    """How many latents pass both gates of Latent Scaling; None where the table does not tell."""
    if table is None or not {"nu_error", "nu_recon", "n_fired"} <= set(table):
        return None
    return int(tuned_specific(table).sum())


def gated(table: pd.DataFrame | None) -> str:
    found = n_gated(table)
    return "" if found is None else number(found)


def studies(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of the studies: every condition, so also every control, with its interval."""
    found = []
    for name, part in (metrics.get("substitution") or {}).items():
        rows = [row for row in part.get("table") or [] if row.get("tokens") == "all"]
        cells = [
            (plain(row["condition"]), *(number(row.get(key)) for key in ("kl", "ci_low", "ci_high")), share(row.get("recovered")))
            for row in rows
        ]  # fmt: skip
        head = ["condition", "KL", "low", "high", "won back"]
        found.append({"title": KL.format(plain(name)), "head": head, "rows": cells})
    rows = (metrics.get("behaviour") or {}).get("table") or []
    cells = [
        (plain(row["behaviour"]), plain(row["condition"]), *(share(row.get(key)) for key in ("rate", "low", "high")))
        for row in rows
    ]  # fmt: skip
    found.append({"title": RATES, "head": ["behaviour", "condition", "rate", "low", "high"], "rows": cells})
    return [study for study in found if study["rows"]]


def limits(study: Study) -> list[str]:
    hook = f", {code(study.pair['hook'])}" if study.pair.get("hook") else ""
    found = [
        f"It reads one place in the models{hook}; what fine-tuning changed elsewhere is not in it.",
        "A class goes by decoder norms alone; dictionaries with an L1 penalty show tuned-only latents that are not. Hold them to "
        "`nu_error` and `nu_recon`.",
        "What a latent stands for is not established by anything on this page.",
    ]
    if (seed := study.config.get("seed")) is not None:
        found.append(
            f"It is one training, of seed {code(seed)}; which latents another seed finds again is not known from it."
        )
    if isinstance(explained := study.validation.get("fve_difference"), int | float):
        found.append(
            f"{share(1 - explained)} of the variance of the models' difference is left in its error."
        )
    return found


def files(paths: Sequence[str]) -> Rows:
    return [
        (code(name), what)
        for name, what in FILES.items()
        if any(path == name or (name.endswith("/") and path.startswith(name)) for path in paths)
    ]
