"""The audit: arms, counts, stability and ablation, in one result with one word."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.interventions import Part
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.gate_audit.ablation import Condition, conditions, effects, marked, outcomes
from tl_crosscoder.studies.gate_audit.arms import ARMS, Noise, arm
from tl_crosscoder.studies.gate_audit.gates import Gate, count_table, measured
from tl_crosscoder.studies.gate_audit.lexical import words_of
from tl_crosscoder.studies.gate_audit.result import AuditResult
from tl_crosscoder.studies.gate_audit.stability import Seed, stability_table
from tl_crosscoder.studies.gate_audit.tasks import Task
from tl_crosscoder.studies.gate_audit.verdict import ALPHA, Evidence, decide
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.records import records
from tl_crosscoder.studies.weights import weights_sha256
from tl_crosscoder.widths import refuse_unlike

#: ``learn(arm, activations, seed)``: a crosscoder trained on the arm's activations; the caller keeps what should survive a kill
Learn = Callable[[str, PairedActivations, int], Crosscoder]


def gate_audit(
    store: PairedActivations,
    learn: Learn,
    *,
    gate: Gate | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    pair: ModelPair | None = None,
    task: Task | None = None,
    off_task: Task | None = None,
    part: Part = "whole",
    noise: Noise = "scale",
    n_matched: int = 20,
    n_turned: int = 5,
    n_null: int = 99,
    margin: float = 0.05,
    detectable: float = 0.15,
    noise_factor: float = 3.0,
    with_lexical: bool = False,
    held_out: float = 0.1,
    max_tokens: int | None = 1_000_000,
    drop: Drop | None = None,
    max_new_tokens: int = 16,
    seed: int = 0,
    parts: str | Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> AuditResult:
    """Whether latents that pass ``gate`` are specific to the tuned model, found again by other seeds, and needed by ``task``.

    ``learn`` trains one crosscoder an arm and seed, on the conversations that are not ``held_out``; the gate is read on the
    same tokens (at most ``max_tokens``), activations are compared across seeds on the others.  The task, which wants
    ``pair``, is done with the first seed's gated latents out of the tuned model: ``part`` "whole", or only the "difference"
    between the models, against ``n_matched`` sets of others and ``n_turned`` random directions.  An effect within ``margin``
    is none; ``detectable`` and ``noise_factor`` as in ``decide``.  ``with_lexical``: latents about single words count as found
    again too, for behaviours that are a fixed sentence.  ``drop``: the tokens that are not edited, if not those that ``store`` left
    out.  ``parts``: a folder where what was measured is kept through a kill.

    Source: the negative result on GRPO-LoRA features (ICML 2026 workshop on mechanistic interpretability), of whose protocol the
    abstract alone is public; its gate, thresholds and tests are replaced by stated ones.
    """
    gate, drop, seeds = gate or Gate(), drop or Drop(**store.manifest["drop"]), list(seeds)
    refuse_unlike(store, "the gate audit")
    _refuse(seeds, pair, task, n_matched)
    _refuse_words(part, noise)
    if pair is not None:
        store.check_against(pair)
    keep = partial(_keep, parts, store)
    seen, rest = store.split(1 - held_out, seed)
    tables: dict[str, list[pd.DataFrame]] = {}
    target: list[Crosscoder] = []
    for name in ARMS:
        there = arm(seen, name, seed=seed, noise=noise)
        about = {"gate": asdict(gate), "arm": name, "noise": noise, "tokens": max_tokens, "seed": seed}
        about["held_out"] = held_out
        tables[name] = []
        for number in seeds:
            say(f"{name}, seed {number}")
            crosscoder = learn(_label(name, noise, seed), there, number)
            tables[name].append(_measured(crosscoder, there, gate, max_tokens, keep(crosscoder, **about)))
            if name == "target":
                target.append(crosscoder)
    say("matching the seeds")
    found = [
        Seed(c, ids := gate.passing(t), gate.alive(t), words_of(c, seen, ids, max_tokens))
        for c, t in zip(target, tables["target"], strict=True)
    ]
    stability = stability_table(found, rest, n_draws=n_null, seed=seed)
    first, ablation, answers = found[0], {}, pd.DataFrame()
    if task is not None and pair is not None and first.gated:
        say(f"taking {len(first.gated)} latents out of the tuned model")
        sets = {"n_matched": n_matched, "n_turned": n_turned, "seed": seed}
        chosen, outside = conditions(first.crosscoder, tables["target"][0], first.gated, first.alive, **sets)
        how = {"part": part, "drop": drop, "max_new_tokens": max_new_tokens}
        about = _asked(pair, task, off_task, chosen) | {"part": part, "tokens": max_new_tokens}
        kept = keep(first.crosscoder, **about, drop=asdict(drop), seed=seed)
        said = kept(
            "answers", lambda: records(outcomes(pair, task, off_task, chosen, progress=progress, **how))
        )
        answers = marked(pd.DataFrame(said).astype({"log_prob": float, "kl": float}), task, off_task)
        ablation = {
            "task": task.name,
            "part": part,
            "n_latents": len(first.gated),
            "outside_caliper": outside,
        }
        ablation |= effects(answers, margin, seed=seed)
    evidence = _evidence(gate, tables, stability, ablation, "all" if with_lexical else "non-lexical")
    word, reasons = decide(evidence, noise_factor=noise_factor, detectable=detectable)
    if task is not None and not ablation:
        reasons.append("the task was not done")
    described = _described(first, tables["target"][0], store)
    settings = {"gate": asdict(gate), "seeds": seeds, "noise": noise, "evidence": asdict(evidence)}
    counts = count_table(tables, gate)
    return AuditResult(counts, stability, described, ablation, answers, word, reasons, settings)


def _asked(pair: ModelPair, task: Task, off_task: Task | None, chosen: Sequence[Condition]) -> dict[str, Any]:
    """What the answers are kept by: the models, what they are asked, and what is taken out."""
    return {
        "conditions": [[c.kind, c.latents] for c in chosen],
        "models": pair.fingerprint,
        "task": [task.name, *task.prompts],
        "gold": list(task.gold) if task.gold else None,
        "off_task": list(off_task.prompts) if off_task else [],
    }


def _refuse(seeds: list[int], pair: ModelPair | None, task: Task | None, n_matched: int) -> None:
    """What could give no verdict, before anything is trained."""
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"an audit wants two seeds or more, all different (three are better); got {seeds}.")
    if task is not None and pair is None:
        raise ValueError(f"the task {task.name!r} wants the models: pass pair=.")
    if task is not None and 1 / (n_matched + 1) > ALPHA:
        raise ValueError(
            f"among n_matched={n_matched} sets no rank has a p below {1 / (n_matched + 1):.2g}, so nothing could pass; "
            f"{math.ceil(1 / ALPHA) - 1} sets or more."
        )
    if task is not None and pair is not None:
        Corpus.prompts(task.prompts, pair.tokenizer)  # raises without a chat template


def _refuse_words(part: str, noise: str) -> None:
    for name, word, known in (("part", part, get_args(Part)), ("noise", noise, get_args(Noise))):
        if word not in known:
            raise ValueError(f"no {name} named {word!r}; known: {', '.join(known)}")


def _measured(
    crosscoder: Crosscoder, acts: PairedActivations, gate: Gate, max_tokens: int | None, kept: Parts
) -> pd.DataFrame:
    """What the gate reads of every latent, kept."""
    rows = kept("table", lambda: records(measured(crosscoder, acts, gate, max_tokens)))
    return pd.DataFrame(rows, dtype=float).rename_axis("latent")


def _label(name: str, noise: str, seed: int) -> str:
    """What tells an arm's activations from those of other audits of the pair."""
    return name if name in ("target", "identity") else f"{name}-{seed}" + f"-{noise}" * (name == "noise")


def _keep(parts: str | Path | None, store: PairedActivations, crosscoder: Crosscoder, **about: Any) -> Parts:
    data = {"corpus": store.corpus.sha256, "rows": len(store)}
    return Parts(parts, study="audit", weights=weights_sha256(crosscoder), **data, **about)


def _evidence(
    gate: Gate,
    tables: dict[str, list[pd.DataFrame]],
    stability: pd.DataFrame,
    ablation: dict[str, Any],
    judged: str,
) -> Evidence:
    counts = {name: sum(len(gate.passing(t)) for t in arm) for name, arm in tables.items()}
    [again] = records(stability.query("latents == @judged"))
    nulls = [again[name] for name in ("p_rotation", "p_random")]
    nan = float("nan")
    names = (
        "effect",
        "low",
        "high",
        "rank_p",
        "equivalence_p",
        "harmless_p",
        "margin",
        "mde",
        "on_minus_off_low",
        "off_low",
    )
    return Evidence(
        target=counts["target"],
        identity=counts["identity"],
        noise=counts["noise"],
        share=nan if again["share"] is None else again["share"],
        p_null=nan if None in nulls else max(nulls),
        n_pairs=int(again["size"]),
        kind=judged,
        accuracy=ablation.get("accuracy_none", nan),
        **{name: ablation.get(name, nan) for name in names},
    )


def _described(seed: Seed, table: pd.DataFrame, store: PairedActivations) -> pd.DataFrame:
    """The gated latents, each with its strongest words."""
    rows = []
    for j in seed.gated:
        words = seed.words[j]
        try:
            shown = [store.tokenizer.decode([i]) for i in words.ids[:3]]
        except ValueError:  # captured from ids, without a tokenizer
            shown = [str(i) for i in words.ids[:3]]
        about = {"latent": j, **{name: table.loc[j, name] for name in ("gate", "delta_norm", "n_fired")}}
        about |= {"lexical": words.lexical, "bits": words.bits, "words": shown}
        rows.append(about | {"top_share": words.share[0] if words.share else np.nan})
    return pd.DataFrame(rows)
