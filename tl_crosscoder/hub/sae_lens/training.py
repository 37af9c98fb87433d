"""Crosscoders trained by SAE-Lens: its trainer on batches of both models side by side, or its runner on both run as one.

``SAETrainer(cfg, sae_lens_training(config), side_by_side(batches, normalizer))`` trains on what ``train`` does;
``LanguageModelSAETrainingRunner(cfg, override_model=joint(pair))`` takes the config itself, as ``cfg.sae``, and leaves a folder
that ``read_sae_lens`` reads.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.hub.sae_lens.extra import needs_sae_lens
from tl_crosscoder.training.data import Feed, refuse_store

if TYPE_CHECKING:
    from tl_crosscoder.hub.sae_lens.native.training_sae import CrosscoderTrainingConfig, CrosscoderTrainingSAE


def sae_lens_config(d_in: int, d_sae: int, k: int | float, **settings: Any) -> "CrosscoderTrainingConfig":
    """The config of a BatchTopK crosscoder for SAE-Lens' trainers; ``d_in`` is the width of one model.

    ``settings``: ``code_norm`` ("sum" or "l2"), and those of SAE-Lens' ``BatchTopKTrainingSAEConfig``.
    """
    needs_sae_lens()
    from tl_crosscoder.hub.sae_lens.native.training_sae import CrosscoderTrainingConfig

    n_models = settings.pop("n_models", 2)
    return CrosscoderTrainingConfig(
        d_in=n_models * d_in, d_sae=d_sae, k=float(k), n_models=n_models, **settings
    )


def sae_lens_training(config: "CrosscoderTrainingConfig") -> "CrosscoderTrainingSAE":
    """The crosscoder to train; ``.crosscoder(normalizer)`` is this library's, afterwards."""
    needs_sae_lens()
    from tl_crosscoder.hub.sae_lens.native.training_sae import CrosscoderTrainingSAE

    return CrosscoderTrainingSAE(config)


def side_by_side(
    batches: Iterable[Tensor], normalizer: Normalizer | None = None, *, first: int = 0
) -> Iterator[Float[Tensor, "batch _"]]:
    """Batches [batch, model, d_in] as SAE-Lens' trainer reads them: normalised, [batch, model · d_in], without end.

    They are read again from the start whenever they end, and checked, as in :func:`tl_crosscoder.train`.  ``first``: so many are
    passed over, those that a training which goes on has seen (``trainer.n_training_steps`` after ``load_trainer_state``).
    """
    refuse_store(batches)
    return _side_by_side(Feed(batches, sys.maxsize), normalizer, first)


def _side_by_side(feed: Feed, normalizer: Normalizer | None, first: int) -> Iterator[Tensor]:
    for n, x in enumerate(feed):
        if n >= first:
            yield (x if normalizer is None else normalizer.normalise(x)).flatten(1)
