"""tokens -> paired activations -> crosscoder -> table -> studies -> report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import MSE, AuxK
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.diffing.config import DiffConfig
from tl_crosscoder.diffing.folder import RunFolder, write_json, write_table
from tl_crosscoder.diffing.report import DiffReport
from tl_crosscoder.diffing.verdict import verdict
from tl_crosscoder.hub.save import save
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import Drop, capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.behaviour import BehaviourResult, behaviour_removal, tuned_answers
from tl_crosscoder.studies.substitution import SubstitutionResult, substitution
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.history import History
from tl_crosscoder.training.train import train


def diff(
    pair: ModelPair,
    corpus: Corpus,
    out: str | Path,
    config: DiffConfig | None = None,
    *,
    title: str | None = None,
    prompts: Sequence[str] | None = None,
    behaviours: Sequence[Behaviour] = (),
    drop: Drop | None = None,
    dtype: str = "float32",
    n_draws: int = 40,
    max_new_tokens: int = 16,
    max_tokens: int = 4096,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> DiffReport:
    """The whole job into the folder ``out``; a finished capture there is used again.

    ``prompts``: questions that both models answer, each answer read by both (the contrastive part).
    ``behaviours``: what held-out prompts should show, if it is known; without them only the substitution study
    runs.  ``dtype`` is that of the stored activations, ``max_tokens`` the size of a batch through the models.
    ``say`` gets a line at each step."""
    config, folder, clock = config or DiffConfig(), RunFolder(Path(out)), _Clock()
    say("capturing both models' activations")
    options = {
        "dtype": dtype,
        "drop": drop or Drop(),
        "prompts": prompts,
        "max_tokens": max_tokens,
        "progress": progress,
    }
    store = capture(pair, corpus, folder.acts, **options)
    clock.lap("capture")
    seen, held_out = store.split(1 - config.held_out, config.seed)
    say(f"training on {len(seen):,} tokens, {len(held_out):,} held out")
    crosscoder, _ = learn(seen, config, log_path=folder.log, progress=progress)
    description = pair.description()
    save(crosscoder, folder.crosscoder, extra={"pair": description})
    clock.lap("train")
    say("one row a latent")
    table = latent_table(crosscoder, held_out)
    write_table(folder.table, table)
    clock.lap("table")
    say("substituting latents in the tuned model")
    texts = _study_texts(pair, store, held_out, behaviours, config, max_new_tokens)
    substitutions = {
        name: substitution(crosscoder, pair, text, table, ranking=config.ranking, top=config.top[1:] or config.top,
                           seed=config.seed, max_tokens=max_tokens)
        for name, text in texts.items()
    }  # fmt: skip
    clock.lap("substitution")
    behaviour = None
    if behaviours:
        say("answering held-out prompts without the latents")
        behaviour = behaviour_removal(
            crosscoder, pair, behaviours, table, ranking=config.ranking, top=config.top, n_draws=n_draws,
            max_new_tokens=max_new_tokens, seed=config.seed,
        )  # fmt: skip
        clock.lap("behaviour")
    metrics = {
        "title": title or "What fine-tuning changed",
        "verdict": verdict(table, substitutions, behaviour),
        "config": asdict(config),
        "pair": description,
        "dictionary": table.attrs["metrics"],
        "classes": table["class"].value_counts().to_dict(),
        "substitution": {name: _substitution_json(result) for name, result in substitutions.items()},
        "behaviour": _behaviour_json(behaviour) if behaviour else None,
        "seconds": clock.laps,
    }
    write_json(folder.metrics, metrics)
    say("writing the report")
    report = DiffReport(folder.root)
    report.write()
    return report


def learn(
    store: PairedActivations, config: DiffConfig, *, log_path: Path | None = None, progress: bool = True
) -> tuple[Crosscoder, History]:
    """A BatchTopK crosscoder of the store: centred, one scale for both models, the same init in both."""
    crosscoder = Crosscoder(
        store.d_in,
        config.d_sae,
        BatchTopK(config.k),
        n_models=store.n_models,
        normalizer=Normalizer.fit(store),
        init_norm=config.init_norm,
        seed=config.seed,
    )
    training = TrainConfig(
        steps=config.steps, lr=config.lr, decay_fraction=0.3, log_path=log_path, progress=progress,
        log_every=max(1, config.steps // 40),
    )  # fmt: skip
    losses = [MSE(), AuxK(dead_after_tokens=max(10_000, len(store) // 10))]
    history = train(crosscoder, store.shuffled(config.batch_size, config.seed), losses, training)
    if history.interrupted:
        raise KeyboardInterrupt
    return crosscoder, history


def _study_texts(pair, store, held_out, behaviours, config, max_new_tokens) -> dict[str, Corpus]:
    """Held-out text, chats first, and for each behaviour the tuned model's own answers to its held-out prompts."""
    sequences = np.random.default_rng(config.seed).permutation(held_out.sequences).tolist()
    chats = [i for i in sequences if store.corpus.flags_of(i)["assistant"].any()]
    texts = {"held-out text": store.corpus.select(chats or sequences).take(config.study_tokens)}
    for behaviour in behaviours:
        texts[behaviour.name] = tuned_answers(pair, behaviour, max_new_tokens)
    return texts


def _substitution_json(result: SubstitutionResult) -> dict[str, Any]:
    return {"table": _records(result.table), "paired": _records(result.paired), "verdict": result.verdict}


def _behaviour_json(result: BehaviourResult) -> dict[str, Any]:
    return {name: _records(getattr(result, name)) for name in ("table", "firing", "answers")}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.to_dict("records")


class _Clock:
    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 1), now
