"""A pair whose whole difference is one direction on one token, and the crosscoder that knows it."""

import copy

import pandas as pd
import torch

from tests.models.fake_pair import byte_tokenizer
from tests.models.tiny_models import tiny_llama_model
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.models.backends import HookBackend
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.types import BASE, TUNED

TRIGGER = "x"
PLANTED, LATENTS = 0, 8


def planted_pair(size: float = 12.0) -> tuple[ModelPair, torch.Tensor, int]:
    """The tuned model embeds the trigger's token elsewhere; read at the input of block 0 that is all there is."""
    tokenizer = byte_tokenizer()
    base = tiny_llama_model(seed=3, vocab=len(tokenizer))
    tuned = copy.deepcopy(base)
    [trigger] = tokenizer(TRIGGER, add_special_tokens=False)["input_ids"]
    shift = torch.randn(base.config.hidden_size, generator=torch.Generator().manual_seed(5))
    shift = shift / shift.norm() * size
    with torch.no_grad():
        tuned.get_input_embeddings().weight[trigger] += shift
    backends = [HookBackend(model, tokenizer) for model in (base, tuned)]
    return ModelPair(*backends, hook="blocks.0.hook_resid_pre"), shift, trigger


def planted_crosscoder(pair: ModelPair, shift: torch.Tensor) -> Crosscoder:
    """Latent 0 fires with 1 on the trigger and writes the shift into the tuned model only; the others write the same into both."""
    embeddings = pair.tuned.model.get_input_embeddings().weight.detach()
    direction = shift / shift.norm()
    along = embeddings @ direction
    top, second = along.topk(2).values
    crosscoder = Crosscoder(pair.d_in, LATENTS, ReLU(), init=Init(norm=0.1, seed=1))
    with torch.no_grad():
        crosscoder.W_enc_rows[PLANTED, BASE] = 0
        crosscoder.W_enc_rows[PLANTED, TUNED] = direction / (top - second)
        crosscoder.b_enc[PLANTED] = -second / (top - second)
        crosscoder.W_dec[PLANTED, BASE] = 0
        crosscoder.W_dec[PLANTED, TUNED] = shift
    return crosscoder.eval()


def latents_of_interest() -> pd.DataFrame:
    """A latent table with the planted latent on top; the others are alike."""
    rows = {
        "rank_score": [1.0] + [0.1 / j for j in range(1, LATENTS)],
        "delta_norm": [1.0] + [0.5 + 0.001 * j for j in range(1, LATENTS)],
        "nu_error": [0.0] + [1.0 + 0.01 * j for j in range(1, LATENTS)],
        "nu_recon": [0.0] + [1.0] * (LATENTS - 1),
        "n_fired": [50.0] * LATENTS,
        "frequency": [0.001] + [0.5] * (LATENTS - 1),
        "mean_act": [1.0] * LATENTS,
        "norm_tuned": [1.0] * LATENTS,
        "class": ["tuned_only"] + ["shared"] * (LATENTS - 1),
    }
    return pd.DataFrame(rows, index=pd.RangeIndex(LATENTS, name="latent"))
