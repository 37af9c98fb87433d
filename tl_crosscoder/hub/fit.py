"""Does a crosscoder do on activations what its files claim?  A wrong scale, hook or order of models shows at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.base import run
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.reconstruction import Reconstruction
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData, PairMismatch
from tl_crosscoder.hub.formats.base import NOT_STATED, Conventions
from tl_crosscoder.hub.same_models import refuse_other_models

TOKENS = 4096
#: L0 may be off by this factor and the share of variance by this much: other text, other first tokens.
L0_FACTOR, FVE_ROOM = 2.0, 0.1
#: By how much the pooled share must rise with the models exchanged to call them swapped.
SWAPPED = 0.05


@dataclass(frozen=True)
class Fit:
    """What was measured on ``tokens`` tokens beside what was claimed; ``problems`` says in words where they disagree."""

    tokens: int
    measured: dict[str, float]
    claimed: dict[str, float]
    problems: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        figures = [
            f"{name} {value:.3g}" + (f" (claimed {self.claimed[name]:.3g})" if name in self.claimed else "")
            for name, value in self.measured.items()
        ]
        return f"on {self.tokens} tokens: {', '.join(figures)}"


def measure(
    crosscoder: Crosscoder,
    on: Any,
    said: Conventions | None = None,
    *,
    trained: Any = None,
    tokens: int = TOKENS,
) -> Fit:
    """L0 and FVE on a few thousand tokens, held against what the files claim.

    ``on``: captured activations, batches of raw [batch model d_in], or a :class:`~tl_crosscoder.models.pair.ModelPair`, which then
    reads text that ships with the library.  Raises PairMismatch where the pair is read at another hook than the files state, or is
    seen to be another than ``trained``, the description of the pair that was kept with the crosscoder.
    """
    if hasattr(on, "capture"):
        refuse_other_models(trained, on.description())
    batches = list(_first(_batches(on, said, tokens), tokens))
    if not batches:
        raise EmptyData("no tokens to check the crosscoder on")
    measured = _figures(crosscoder, batches)
    claimed = dict(said.claims) if said else {}
    problems = list(_disagreements(measured, claimed))
    if crosscoder.n_models == 2:
        swapped = _figures(crosscoder, [x.flip(1) for x in batches])
        if swapped["fve"] > measured["fve"] + SWAPPED:
            problems.append(
                f"with the models exchanged fve is {swapped['fve']:.3g}, not {measured['fve']:.3g}: base and "
                "tuned look swapped"
            )
    return Fit(sum(map(len, batches)), measured, claimed, tuple(problems))


def check_fit(
    crosscoder: Crosscoder, on: Any, said: Conventions | None = None, *, trained: Any = None
) -> Fit:
    """As :func:`measure`; PairMismatch where the figures disagree."""
    fit = measure(crosscoder, on, said, trained=trained)
    if fit.problems:
        raise PairMismatch(
            f"{'; '.join(fit.problems)}. Measured {fit}. Look at the hook, the order of the models, the "
            "normalisation and the first tokens: "
            "tl-crosscoder inspect says what the files state of each"
        )
    return fit


def _disagreements(measured: dict[str, float], claimed: dict[str, float]) -> Iterator[str]:
    l0, claim = measured["l0"], claimed.get("l0")
    if not l0:
        yield "no latent is ever active"
    elif claim and not claim / L0_FACTOR <= l0 <= claim * L0_FACTOR:
        yield f"{l0:.4g} latents are active a token, the files claim {claim:.4g}"
    for name in ("fve", "fve_base", "fve_tuned"):
        if name in measured and name in claimed and measured[name] < claimed[name] - FVE_ROOM:
            yield f"{name} is {measured[name]:.3g}, the files claim {claimed[name]:.3g}"
    for name in ("fve", "fve_base", "fve_tuned"):
        if measured.get(name, 1.0) < 0:
            yield f"{name} is {measured[name]:.3g}: a constant would explain more"


@torch.no_grad()
def _figures(crosscoder: Crosscoder, batches: list[Tensor]) -> dict[str, float]:
    parts = [Firing(crosscoder), Reconstruction(crosscoder)]
    run(crosscoder, batches, parts)
    found = {name: float(value) for part in parts for name, value in part.metrics().items()}
    return {name: found[name] for name in ("l0", "fve", "fve_base", "fve_tuned") if name in found}


def _batches(on: Any, said: Conventions | None, tokens: int) -> Iterable[Float[Tensor, "batch model d_in"]]:
    if hasattr(on, "capture"):
        return _captured(on, said, tokens)
    return (
        on.shuffled(1024, seed=0)
        if hasattr(on, "shuffled") and len(on) >= 1024
        else on.batches(1024)
        if hasattr(on, "batches")
        else on
    )


def _captured(pair: Any, said: Conventions | None, tokens: int) -> Iterable[Tensor]:
    from tl_crosscoder.models.capture import capture
    from tl_crosscoder.models.corpus import Corpus

    hook = str(pair.description()["hook"])
    if (
        said
        and said.hook != NOT_STATED
        and "blocks." in said.hook
        and hook.startswith("blocks.")
        and hook not in said.hook
    ):
        raise PairMismatch(f"the pair is read at {hook}, the crosscoder at {said.hook}")
    text = Path(str(files("tl_crosscoder.data").joinpath("text")))
    half = (Corpus.from_file(text / name, pair.tokenizer) for name in ("novels.txt", "dialogues.jsonl"))
    parts = [corpus.take(tokens // 2, seed=0) for corpus in half]
    return capture(pair, parts[0] + parts[1], progress=False).batches(1024)


def _first(batches: Iterable[Any], tokens: int) -> Iterator[Tensor]:
    for batch in batches:
        x = getattr(batch, "x", batch)[:tokens]
        tokens -= len(x)
        yield x
        if tokens <= 0:
            return
