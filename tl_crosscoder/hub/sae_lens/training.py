"""Crosscoders trained by SAE-Lens: its trainer on batches of both models side by side, or its runner on both run as one.

``SAETrainer(cfg, sae_lens_training(config), batches)`` takes any iterator of [batch, 2 · d_in], normalised by you;
``LanguageModelSAETrainingRunner(cfg, override_model=joint(pair))`` takes the config itself, as ``cfg.sae``, and leaves a folder
that ``read_sae_lens`` reads.
"""

from typing import TYPE_CHECKING, Any

from tl_crosscoder.hub.sae_lens.extra import needs_sae_lens

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
    from tl_crosscoder.hub.sae_lens.native.training_sae import CrosscoderTrainingSAE

    return CrosscoderTrainingSAE(config)
