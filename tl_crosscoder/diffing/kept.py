"""Crosscoders that a study trains by the dozen: each kept in its folder, so that none is trained twice."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.diffing.config import DiffConfig
from tl_crosscoder.diffing.run import learn
from tl_crosscoder.hub.save import load, save
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.models.manifest import trained_on
from tl_crosscoder.training.checkpoint import unfinished


def kept_learning(
    directory: str | Path,
    config: DiffConfig,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Callable[[str, PairedActivations, int], Crosscoder]:
    """``learn(name, activations, seed)``: the crosscoder of these activations, now or from an earlier call with the same config.

    An unfinished training is gone on with.  Raises KeyboardInterrupt where a signal stopped one.
    """

    def one(name: str, store: PairedActivations, seed: int) -> Crosscoder:
        settings = replace(config, seed=seed)
        about = {
            "config": asdict(settings),
            "corpus": store.corpus.sha256,
            "rows": store.runs,
            "models": store.manifest["pair"],
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(directory) / f"{name}-{seed}-{digest}"
        if (folder / "crosscoder").exists():
            return load(folder / "crosscoder").to(device)
        checkpoints = folder / "checkpoints"
        crosscoder, history = learn(
            store, settings, device=device, progress=progress, checkpoints=checkpoints,
            resume=checkpoints if unfinished(checkpoints) else None,
        )  # fmt: skip
        if history.interrupted:
            raise KeyboardInterrupt
        save(
            crosscoder,
            folder / "crosscoder",
            extra=trained_on(store.manifest) | {"config": asdict(settings)},
        )
        return crosscoder

    return one
