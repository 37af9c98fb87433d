"""Published trainings as presets.

A preset is a function below; what its source leaves open, or what differs here, stands in its notes.  Counts of steps and of tokens
(warm-up, annealing, dead after) keep their share of the run; the step size, the weights of the losses and k are as published.
"""

from collections.abc import Callable
from typing import Any

from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, Delta, L2Norm
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import ReLU, Split
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.recipe import Preset, Recipe, Run

#: ``TrainConfig.clip`` of a training without clipping.
NO_CLIP = 1e9
#: √d_in / mean norm for each model, not centred, as Lindsey et al. 2024.
PER_MODEL = {"center": False, "scale": "per_model", "statistic": "mean_norm"}
PRESETS: dict[str, Preset] = {}

Build = Callable[[Run], dict[str, Any]]


def recipe(
    name: str,
    d_in: int,
    *,
    d_sae: int | None = None,
    tokens: int | None = None,
    batch_size: int | None = None,
    k: int | None = None,
    seed: int = 0,
) -> Recipe:
    """The preset ``name``: minder_l1, minder_batchtopk, kissane_l1, papergrade, delta, dsf or dfc.

    What is left out is as published.  ``tokens``: to train on, each visit counted.  ``k``: active latents per token in all.

    Raises KeyError for an unknown name, ValueError for a budget of less than a step and for a k where nothing asks for one.
    """
    if name not in PRESETS:
        raise KeyError(f"no recipe named {name!r}; known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    batch_size = preset.batch_size if batch_size is None else batch_size
    d_sae = d_sae or preset.d_sae or preset.expansion * d_in
    tokens = preset.tokens if tokens is None else tokens
    if tokens < batch_size:
        raise ValueError(f"tokens={tokens} are less than a batch of {batch_size}")
    if k is not None and preset.k is None:
        raise ValueError(f"{name} has no k: the weight of its L1 loss decides how many latents are active")
    k = preset.k or 0 if k is None else k
    if preset.k and not 0 < k <= d_sae:
        raise ValueError(f"k={k} latents are to be active on a token, of d_sae={d_sae}; pass another k")
    run = Run(preset, d_in, d_sae, k, batch_size, tokens // batch_size, seed)
    parts = preset.build(run)
    parts["settings"] = {"d_in": d_in, "d_sae": d_sae, **parts["settings"]}
    return Recipe(name=name, batch_size=batch_size, **parts)


def published(**figures: int) -> Callable[[Build], Build]:
    """Decorator: the function from a run to the parts of its recipe is the preset of its name."""

    def add(build: Build) -> Build:
        PRESETS[build.__name__] = Preset(build, **figures)
        return build

    return add


@published(tokens=200_000_000, batch_size=2048, d_sae=73_728)
def minder_l1(run: Run) -> dict[str, Any]:
    return {
        "source": "Minder et al. 2025, arXiv:2504.02922 (L1), and its code",
        "settings": {"sparsity": ReLU(), "init": Init(0.05, directions="uniform", seed=run.seed)},
        "losses": (L2Norm(), L1(4.1e-2, warmup_fraction=0.0)),
        "config": TrainConfig(
            steps=run.steps,
            lr=1e-4,
            warmup_steps=run.scaled_steps(1000),
            decay_fraction=0.0,
            clip=NO_CLIP,
            b_dec_init="zeros",
        ),
        "normalizer_settings": None,
        "notes": (
            "init norm .05 as the paper is quoted; its code has .005",
            "raw activations of Gemma-2-2B: the L1 weight is for their scale and for the unsquared loss",
        ),
    }


@published(tokens=200_000_000, batch_size=2048, d_sae=73_728, k=100)
def minder_batchtopk(run: Run) -> dict[str, Any]:
    return {
        "source": "Minder et al. 2025, arXiv:2504.02922 (BatchTopK), and its code",
        "settings": {
            "sparsity": run.batch_topk(run.k),
            "init": Init(1.0, directions="uniform", seed=run.seed),
        },
        "losses": (L2Norm(), AuxK(1 / 32, dead_after_tokens=run.dead_after(10_000_000), relative=True)),
        "config": TrainConfig(
            steps=run.steps, lr=1e-4, warmup_steps=run.scaled_steps(1000), decay_fraction=0.0
        ),
        "normalizer_settings": None,
        "notes": (
            "k is not annealed: whether it was for the released Gemma-2-2B crosscoder is open; the code of that time could not",
            "raw activations, and the same start in both models, which starves rare concepts of one model on planted data",
        ),
    }


@published(tokens=400_000_000, batch_size=4096, d_sae=16_384)
def kissane_l1(run: Run) -> dict[str, Any]:
    return {
        "source": "Kissane et al. 2024, an open replication of Lindsey et al. 2024, and its code",
        "settings": {"sparsity": ReLU(), "init": Init(0.08, same=False, seed=run.seed)},
        "losses": (MSE(), L1(2.0, warmup_fraction=0.05)),
        "config": TrainConfig(
            steps=run.steps, lr=5e-5, warmup_steps=0, decay_fraction=0.2, clip=1.0, b_dec_init="zeros"
        ),
        "normalizer_settings": PER_MODEL,
        "notes": (
            "each model has a scale of its own: decoder norms and classes are in those units",
            "the source fits the scales with the first position; drop it at capture, as this library does",
        ),
    }


@published(tokens=100_000_000, batch_size=4096, d_sae=73_728, k=100)
def papergrade(run: Run) -> dict[str, Any]:
    return {
        "source": "OpenInterpretability, 'papergrade' crosscoder of Gemma-2-2B, and its notebook",
        "settings": {
            "sparsity": run.batch_topk(run.k, 10 * run.k, 5000),
            "init": Init(1.0, same=False, seed=run.seed),
        },
        "losses": (MSE(), L1(4.1e-2, warmup_fraction=0.0)),
        "config": TrainConfig(
            steps=run.steps, lr=1e-4, warmup_steps=run.scaled_steps(1000), decay_fraction=0.2
        ),
        "normalizer_settings": PER_MODEL,
        "notes": (
            "the notebook adds an L1 term to BatchTopK, which brings shrinkage back, and has no AuxK: 43 % of its latents died",
            "its encoder reads x - b_dec; here b_enc takes that up, the same functions from another start",
            "its threshold is each latent's smallest kept pre-activation over 20 batches; here one score for all, by running mean",
        ),
    }


@published(tokens=204_800_000, batch_size=4096, expansion=5, k=600)
def delta(run: Run) -> dict[str, Any]:
    shared, k_rest = 0.2, max(1, round(run.k / 3))
    if run.k < 2:
        raise ValueError(f"delta shares k between two parts, of which each wants 1 or more, got k={run.k}")
    return {
        "source": "Kassem et al. 2026, arXiv:2603.04426 (Delta-Crosscoder), which has no public code",
        "settings": {
            "sparsity": Split(shared, run.batch_topk(run.k - k_rest), run.batch_topk(k_rest)),
            "encoder": "mean",
            "init": Init(1.0, same=shared, seed=run.seed),
        },
        "losses": (MSE(), Delta(0.005, shared), AuxK(1 / 32, dead_after_tokens=run.dead_after(10_000_000))),
        "config": TrainConfig(
            steps=run.steps, lr=1e-4, warmup_steps=run.scaled_steps(1000), decay_fraction=0.0
        ),
        "normalizer_settings": {},
        "notes": (
            "k is read as 400 on the shared fifth and 200 on the rest, each chosen over the batch; k here is their sum",
            "the weight .005 is published without its scale; in these units (squared, summed over d_in) it does next to nothing: "
            "about 1 was needed on planted data",
            "unreported, so chosen here: centred activations on one scale, warm-up, dead after 10M tokens, init; the models start "
            "apart on all but the shared latents, else the difference of their decoders starts at 0",
            "the source also trains on both models' answers to 200,000 prompts, a tenth of its tokens",
        ),
    }


@published(tokens=400_000_000, batch_size=4096, d_sae=16_384)
def dsf(run: Run) -> dict[str, Any]:
    shared = 0.1
    return {
        "source": "Circuits Updates, January and February 2025 (designated shared features); figures of Kissane et al. 2024",
        "settings": {
            "sparsity": ReLU(),
            "partition": Partition(shared=shared),
            "init": Init(0.08, same=False, seed=run.seed),
        },
        "losses": (MSE(), L1(2.0, shared=shared, shared_factor=0.15)),
        "config": TrainConfig(
            steps=run.steps, lr=5e-5, warmup_steps=0, decay_fraction=0.2, b_dec_init="zeros"
        ),
        "normalizer_settings": PER_MODEL,
        "notes": (
            "the shared latents' price is .1 to .2 of the others'; .15 here",
            "how many latents are shared is not published; the crosscode library advises against more than a tenth",
            "size, L1 weight and schedule are kissane_l1's; the source trains JumpReLU, for which see TanhPenalty",
            "ties are in normalised units: raw rows of the two models differ by the ratio of their scales",
        ),
    }


@published(tokens=204_800_000, batch_size=2048, d_sae=131_072, k=200)
def dfc(run: Run) -> dict[str, Any]:
    own = 0.05
    return {
        "source": "Jiralerspong & Bricken 2026, arXiv:2602.11729 (dedicated feature crosscoder), as third parties quote it",
        "settings": {
            "sparsity": run.batch_topk(run.k, 5 * run.k, 5000),
            "partition": Partition(base=own, tuned=own),
            "init": Init(0.4, seed=run.seed),
        },
        "losses": (MSE(), AuxK(0.03, dead_after_tokens=run.dead_after(10_000_000))),
        "config": TrainConfig(
            steps=run.steps, lr=1e-4, warmup_steps=run.scaled_steps(1000), decay_fraction=0.0
        ),
        "normalizer_settings": {"center": False, "scale": "per_model", "statistic": "median_norm"},
        "notes": (
            "5 % of the latents for each model; 1 and 3 % are published too",
            "the text masks decoders only; encoders are masked as well here, so that a latent does not read the other model",
            "the source leaves tokens of twice the median norm out of the loss; drop them at capture (Drop(sinks=...))",
            "warm-up and the loss are unreported: 1000 steps, squared error",
            "delta_norm is 0 or 1 by construction: judge exclusiveness by Latent Scaling or by effects",
        ),
    }
