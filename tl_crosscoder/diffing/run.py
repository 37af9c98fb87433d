"""tokens -> paired activations -> crosscoder -> table -> studies -> report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE, AuxK, Loss
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.shard import WHOLE, Shard
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.diffing.config import DiffConfig
from tl_crosscoder.diffing.folder import RunFolder, write_json, write_table
from tl_crosscoder.diffing.report import DiffReport
from tl_crosscoder.diffing.verdict import verdict
from tl_crosscoder.files import sha256
from tl_crosscoder.hub.save import save
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.manifest import trained_on
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.behaviour import BehaviourResult, behaviour_removal, tuned_answers
from tl_crosscoder.studies.substitution import SubstitutionResult, substitution
from tl_crosscoder.training.checkpoint import unfinished
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.history import History
from tl_crosscoder.training.recipes import recipe
from tl_crosscoder.training.train import train
from tl_crosscoder.widths import alike, refuse_unlike


def diff(
    pair: ModelPair,
    corpus: Corpus,
    out: str | Path,
    config: DiffConfig | None = None,
    *,
    title: str | None = None,
    demo: str | None = None,
    prompts: Sequence[str] | None = None,
    behaviours: Sequence[Behaviour] = (),
    drop: Drop | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    n_draws: int = 40,
    max_new_tokens: int = 16,
    max_tokens: int = 4096,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> DiffReport:
    """The whole job into the folder ``out``; a finished capture there is used again, and an unfinished training gone on with.

    ``prompts``: questions that both models answer, each answer read by both (the contrastive part).
    ``demo`` names the planted pair, if it is one, so that later studies find it.
    ``behaviours``: what held-out prompts should show, if it is known; without them only the substitution study
    runs.  ``dtype`` is that of the stored activations, ``max_tokens`` the size of a batch through the models.
    ``say`` gets a line at each step.

    Raises ValueError where a held-out prompt of a behaviour is in the text or among the prompts.
    """
    config, drop, folder, clock = config or DiffConfig(), drop or Drop(), RunFolder(Path(out)), _Clock()
    refuse_unlike(pair, "diff", "capture, learn, latent_table, steer and ablate work")
    refuse_held_out_prompts(corpus, prompts or (), behaviours, pair.tokenizer)
    say("capturing both models' activations")
    reading = {
        "dtype": dtype,
        "drop": drop,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "progress": progress,
    }
    store = capture(pair, corpus, folder.acts, **reading)
    say(f"kept {len(store):,} tokens of each model; dropped {store.manifest['dropped']}")
    clock.lap("capture")

    seen, held_out = store.split(1 - config.held_out, config.seed)
    say(f"training on {len(seen):,} tokens, {len(held_out):,} held out")
    crosscoder, history = learn(
        seen,
        config,
        device=pair.base.device,
        log_path=folder.log,
        progress=progress,
        checkpoints=folder.checkpoints,
        resume=folder.checkpoints if unfinished(folder.checkpoints) else None,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    save(crosscoder, folder.crosscoder, extra=trained_on(store.manifest) | {"config": asdict(config)})
    clock.lap("train")

    say("one row a latent")
    table = latent_table(crosscoder, held_out)
    write_table(folder.table, table)
    clock.lap("table")

    say("putting latents into the base model's activations")
    asking = {"ranking": config.ranking, "top": config.top, "drop": drop, "seed": config.seed}
    texts = _study_texts(pair, held_out, behaviours, config, max_new_tokens)
    substitutions = {
        name: substitution(crosscoder, pair, text, table, max_tokens=max_tokens, **asking)
        for name, text in texts.items()
    }
    clock.lap("substitution")
    behaviour = None
    if behaviours:
        say("answering held-out prompts without the latents")
        asking |= {"n_draws": n_draws, "max_new_tokens": max_new_tokens}
        behaviour = behaviour_removal(crosscoder, pair, behaviours, table, **asking)
        clock.lap("behaviour")

    about = {
        "title": title or "What fine-tuning changed",
        "demo": demo,
        "config": asdict(config),
        "pair": pair.description(),
    }
    about |= {"table_sha256": sha256(folder.table), "seconds": clock.laps}
    write_json(folder.metrics, about | figures(store, table, substitutions, behaviour))
    say("writing the report")
    report = DiffReport(folder.root)
    report.write()
    return report


def figures(
    store: PairedActivations,
    table: pd.DataFrame,
    substitutions: dict[str, SubstitutionResult],
    behaviour: BehaviourResult | None,
) -> dict[str, Any]:
    """The verdict and everything it rests on, for ``metrics.json``."""
    return {
        "verdict": verdict(table, substitutions, behaviour),
        "store": {"tokens": len(store), **{name: store.manifest[name] for name in ("dropped", "medians")}},
        "dictionary": table.attrs["metrics"],
        "classes": table["class"].value_counts().to_dict(),
        "substitution": {name: result.to_dict() for name, result in substitutions.items()},
        "behaviour": behaviour.to_dict() if behaviour else None,
    }


def learn(
    store: PairedActivations,
    config: DiffConfig,
    *,
    device: torch.device | str = "cpu",
    log_path: Path | None = None,
    progress: bool = True,
    checkpoints: Path | None = None,
    checkpoint_every: int = 500,
    resume: Path | None = None,
    shard: Shard = WHOLE,
) -> tuple[Crosscoder, History]:
    """A crosscoder of the store: ``config.recipe``, or BatchTopK on centred data with one scale.

    With a shard: the latents of this process.
    """
    shard.n_held(config.d_sae)
    shard.n_read(config.batch_size)
    make = plain if config.recipe is None else by_recipe
    crosscoder, losses, training = make(store, config, shard)
    training = replace(
        training,
        checkpoint_every=checkpoint_every,
        log_path=log_path,
        progress=progress,
        log_every=max(1, config.steps // 40),
    )
    batches = store.shuffled(config.batch_size, config.seed)
    crosscoder.to(device)
    return crosscoder, train(crosscoder, batches, losses, training, checkpoints=checkpoints, resume=resume)


def plain(
    store: PairedActivations, config: DiffConfig, shard: Shard
) -> tuple[Crosscoder, Sequence[Loss], TrainConfig]:
    """The training that found the planted differences best (docs/results.md)."""
    # of models of unlike width nothing can start alike, and the norms say nothing about each other
    one = alike(store)
    same = (0.8 if one else 0.0) if config.init_same is None else config.init_same
    crosscoder = Crosscoder(
        store.d_in,
        config.d_sae,
        BatchTopK(config.k or 32),
        n_models=store.n_models,
        normalizer=Normalizer.fit(store, scale="common" if one else "per_model"),
        init=Init(norm=config.init_norm, same=same, seed=config.seed),
        widths=store.widths,
        shard=shard,
    )
    losses = [MSE(), AuxK(dead_after_tokens=max(10_000, len(store) // 10))]
    return crosscoder, losses, TrainConfig(steps=config.steps, lr=config.lr or 1e-3, decay_fraction=0.3)


def by_recipe(
    store: PairedActivations, config: DiffConfig, shard: Shard
) -> tuple[Crosscoder, Sequence[Loss], TrainConfig]:
    """A published training at the config's sizes."""
    tokens = config.steps * config.batch_size
    made = recipe(
        config.recipe or "",
        store.d_in,
        d_sae=config.d_sae,
        tokens=tokens,
        batch_size=config.batch_size,
        k=config.k,
        seed=config.seed,
    )
    made = replace(made, settings={**made.settings, "widths": store.widths})
    training = made.config if config.lr is None else replace(made.config, lr=config.lr)
    crosscoder = made.crosscoder(made.normalizer(store, max_tokens=len(store)), shard)
    return crosscoder, made.losses, training


def refuse_held_out_prompts(
    corpus: Corpus, prompts: Sequence[str], behaviours: Sequence[Behaviour], tokenizer: Any
) -> None:
    """Raises ValueError where a prompt that is to measure a behaviour opens a chat of the corpus or is among ``prompts``."""
    held_out = sorted({prompt for behaviour in behaviours for prompt in behaviour.heldout})
    if not held_out:
        return
    asked = Corpus.prompts(held_out, tokenizer)
    openings = {tuple(asked.ids_of(i).tolist()): prompt for i, prompt in enumerate(held_out)}
    found = [prompt for prompt in held_out if prompt in set(prompts)]
    for i in range(len(corpus)):
        spoken = corpus.flags_of(i)["assistant"].nonzero()
        if len(spoken):
            opening = tuple(corpus.ids_of(i)[: int(spoken[0])].tolist())
            found += [openings[opening]] if opening in openings else []
    if found:
        raise ValueError(
            f"{found[0]!r} is to measure a behaviour and is also in the text; take it out of one of the two."
        )


def held_out_text(held_out: PairedActivations, seed: int, n_tokens: int) -> Corpus:
    """Text that the crosscoder never saw, as the substitution study reads it: chats if there are any."""
    sequences = np.random.default_rng(seed).permutation(held_out.sequences).tolist()
    chats = [i for i in sequences if held_out.corpus.flags_of(i)["assistant"].any()]
    return held_out.corpus.select(chats or sequences).take(n_tokens)


def _study_texts(pair, held_out, behaviours, config, max_new_tokens) -> dict[str, Corpus]:
    """Held-out text, and for each behaviour the tuned model's own answers to its held-out prompts."""
    texts = {"held-out text": held_out_text(held_out, config.seed, config.study_tokens)}
    return texts | {b.name: tuned_answers(pair, b, max_new_tokens) for b in behaviours}


class _Clock:
    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 1), now
