"""What is compared on narrow fine-tunes: crosscoders at equal L0, and a dictionary of the difference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import tl_crosscoder as tlc
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE, AuxK, Delta, Loss
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK, Sparsity, Split
from tl_crosscoder.diffing.config import DiffConfig
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train
from tl_crosscoder.types import BASE, TUNED


@dataclass(frozen=True)
class Variant:
    """``sparsity(k)``, and what else differs.  ``n_models=1``: a dictionary of tuned − base."""

    sparsity: Callable[[int], Sparsity] = BatchTopK
    same: bool | float = False
    losses: tuple[Loss, ...] = ()
    partition: Partition = Partition()  # noqa: RUF009 - frozen
    encoder: str = "sum"
    n_models: int = 2


def split(shared: float, rest: float) -> Callable[[int], Sparsity]:
    """``rest``: the share of k for latents that are not shared."""
    return lambda k: Split(shared, BatchTopK(k - round(rest * k)), BatchTopK(round(rest * k)))


VARIANTS = {
    "BatchTopK, same": Variant(same=True),
    "BatchTopK, same on 80 %": Variant(same=0.8),
    "BatchTopK, apart": Variant(),
    "Delta 1, same on 80 %": Variant(split(0.8, 1 / 8), 0.8, (Delta(1.0, 0.8),)),
    "DSF 80 %": Variant(partition=Partition(shared=0.8)),
    "DFC 5 %": Variant(partition=Partition(base=0.05, tuned=0.05)),
    "diff-SAE, k": Variant(n_models=1),
    "diff-SAE, k / 8": Variant(lambda k: BatchTopK(k // 8), n_models=1),
    "Delta .005, as published": Variant(split(0.2, 1 / 3), 0.2, (Delta(0.005, 0.2),), encoder="mean"),
}


def learned(variant: Variant, seen: PairedActivations, config: DiffConfig) -> Crosscoder:
    """The variant trained on the store, always a crosscoder of both models."""
    source = tlc.difference(seen) if variant.n_models == 1 else seen
    crosscoder = Crosscoder(
        seen.d_in,
        config.d_sae,
        variant.sparsity(config.k or 32),
        n_models=variant.n_models,
        normalizer=Normalizer.fit(source),
        encoder="mean" if variant.encoder == "mean" else "sum",
        partition=variant.partition,
        init=Init(norm=config.init_norm, same=variant.same, seed=config.seed),
    )
    losses = [MSE(), AuxK(dead_after_tokens=max(10_000, len(seen) // 10)), *variant.losses]
    training = TrainConfig(steps=config.steps, lr=config.lr or 1e-3, decay_fraction=0.3, progress=False)
    history = train(crosscoder, source.shuffled(config.batch_size, config.seed), losses, training)
    if history.interrupted:  # a half-trained one is no cell
        raise KeyboardInterrupt
    return crosscoder if variant.n_models == 2 else of_both(crosscoder, Normalizer.fit(seen).mean)


@torch.no_grad()
def of_both(sae: Crosscoder, mean: torch.Tensor) -> Crosscoder:
    """The dictionary of a difference as a crosscoder of both models that reads tuned − base and writes to tuned: the same codes.

    ``mean``: both models' mean activations, whose difference is the mean that the dictionary takes off.  Its reconstruction of
    base is that mean alone; norms and Latent Scaling say nothing about it.
    """
    units = Normalizer(mean, sae.normalizer.scale.expand(2))
    made = Crosscoder(sae.d_in, sae.d_sae, sae.sparsity, normalizer=units)
    made.W_enc_rows.copy_(torch.cat([-sae.W_enc_rows, sae.W_enc_rows], 1))
    made.W_dec.zero_()[:, TUNED] = sae.W_dec[:, 0]
    made.b_dec.zero_()[TUNED] = sae.b_dec[0]
    made.b_enc.copy_(sae.b_enc)
    assert made.W_dec[:, BASE].abs().max() == 0
    return made.eval()
