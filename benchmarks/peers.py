"""Other libraries' training steps, each taken as its own trainer takes it: its loss, optimiser, clip, threshold and dead counters.

None is a dependency.  SAE-Lens comes with ``pip install sae-lens``; of the others put a checkout on the path:

    git clone https://github.com/science-of-finetuning/crosscoder_learning
    git clone https://github.com/EleutherAI/sparsify
    git clone https://github.com/oli-clive-griffin/crosscode
    git clone https://github.com/OpenMOSS/Language-Model-SAEs        # Llamascopium
    PYTHONPATH=crosscoder_learning:sparsify:crosscode:Language-Model-SAEs/src python benchmarks/step.py

with what their imports ask for (natsort, schedulefree, fire, more-itertools, json-repair, cattrs, tomlkit, pymongo,
pydantic-settings).  What cannot be imported is skipped.  Dictionaries of one model see both models' activations side by side.
"""

# pyright: reportMissingImports=false

import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
from contenders import SILENT, Contender, Start, Unsupported
from torch import Tensor


class DictionaryLearning(Contender):
    """BatchTopKCrossCoderTrainer.update, of the code with which Minder et al. 2025 trained."""

    key, title = "dictionary-learning", "dictionary_learning BatchTopK crosscoder"

    def __init__(self, start: Start, lr: float):
        from dictionary_learning.trainers.crosscoder import BatchTopKCrossCoderTrainer

        d_sae, n_models, d_in = start.W_dec.shape
        self.dead, self.steps = start.dead, 1  # its step 0 would move the decoder's bias
        self.trainer = BatchTopKCrossCoderTrainer(
            steps=1_000_000, activation_dim=d_in, dict_size=d_sae, k=start.k, layer=0, lm_name="", num_layers=n_models,
            lr=lr, warmup_steps=0, threshold_start_step=0, device="cpu",
        )  # fmt: skip
        ae = self.trainer.ae
        fill(ae.encoder.weight, start.W_enc.permute(1, 2, 0))
        fill(ae.encoder.bias, start.b_enc)
        fill(ae.decoder.weight, start.W_dec.transpose(0, 1))
        fill(ae.decoder.bias, start.b_dec)

    def keep_dead(self) -> None:
        self.trainer.num_tokens_since_fired[self.dead] = SILENT

    def step(self, x: Tensor) -> Tensor:
        loss = self.trainer.update(self.steps, x)
        self.steps += 1
        return torch.tensor(loss)

    @torch.no_grad()
    def l0(self, x: Tensor) -> float:
        return self.trainer.ae.encode(x, use_threshold=False).count_nonzero().item() / len(x)


class SAELens(Contender):
    """SAETrainer.step with the BatchTopK training SAE."""

    key, title = "sae-lens", "SAE-Lens BatchTopK on 2d"
    autocast = False

    def __init__(self, start: Start, lr: float):
        from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        d_sae, n_models, d_in = start.W_dec.shape
        self.dead = start.dead
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=n_models * d_in, d_sae=d_sae, k=start.k))
        config = SAETrainerConfig(
            total_training_samples=1 << 40, train_batch_size_samples=1 << 10, lr=lr, lr_end=lr, autocast=self.autocast
        )  # fmt: skip
        self.trainer = SAETrainer(config, sae, iter(()))
        fill(sae.W_enc, start.W_enc.flatten(1).T)
        fill(sae.b_enc, centred_bias(start))
        fill(sae.W_dec, start.W_dec.flatten(1))
        fill(sae.b_dec, start.b_dec.flatten())

    def keep_dead(self) -> None:
        self.trainer.n_forward_passes_since_fired[self.dead] = self.trainer.cfg.dead_feature_window + 1

    def step(self, x: Tensor) -> Tensor:
        loss = self.trainer.step(x.flatten(1)).loss.detach()
        self.trainer.n_training_steps += 1
        return loss

    @torch.no_grad()
    def l0(self, x: Tensor) -> float:
        return self.trainer.sae.encode(x.flatten(1)).count_nonzero().item() / len(x)


class SAELensBf16(SAELens):
    """With its ``autocast`` option."""

    key, title = "sae-lens-bf16", "SAE-Lens BatchTopK on 2d, autocast bf16"
    autocast = True


class Sparsify(Contender):
    """The steps of sparsify's Trainer.fit around its SparseCoder, with its Adam; its TopK keeps k latents on every token."""

    key, title = "sparsify", "sparsify TopK on 2d"

    def __init__(self, start: Start, lr: float):
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton decoder wants a GPU
        from sparsify.config import SparseCoderConfig, TrainConfig
        from sparsify.sparse_coder import SparseCoder
        from transformers import get_linear_schedule_with_warmup

        d_sae, n_models, d_in = start.W_dec.shape
        self.dead = start.dead
        self.coder = SparseCoder(n_models * d_in, SparseCoderConfig(k=start.k, num_latents=d_sae))
        self.config = TrainConfig(self.coder.cfg, optimizer="adam", auxk_alpha=1 / 32)
        rows = start.W_dec.flatten(1)
        norms = rows.norm(dim=1)  # its decoder rows have length 1
        fill(self.coder.encoder.weight, start.W_enc.flatten(1) * norms[:, None])
        fill(self.coder.encoder.bias, centred_bias(start) * norms)
        fill(self.coder.W_dec, rows / norms[:, None])
        fill(self.coder.b_dec, start.b_dec.flatten())
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=lr)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, 0, 1_000_000)
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.long)
        self.did_fire = torch.zeros(d_sae, dtype=torch.bool)

    def keep_dead(self) -> None:
        self.tokens_since_fired[self.dead] = self.config.dead_feature_threshold + 1

    def step(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        self.coder.set_decoder_norm_to_unit_norm()
        out = self.coder(x=y, y=y, dead_mask=self.tokens_since_fired > self.config.dead_feature_threshold)
        self.did_fire[out.latent_indices.flatten()] = True
        loss = out.fvu + self.config.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.tokens_since_fired += len(y)
        self.tokens_since_fired[self.did_fire] = 0
        self.did_fire.zero_()
        return loss.detach()

    @torch.no_grad()
    def l0(self, x: Tensor) -> float:
        return self.coder.encode(x.flatten(1)).top_acts.count_nonzero().item() / len(x)


class Crosscode(Contender):
    """TopKStyleAcausalCrosscoderTrainer.train, one step at a time.

    Its trainer computes the auxiliary loss and leaves it out of what it minimises.
    """

    key, title = "crosscode", "crosscode BatchTopK crosscoder"
    loss: Tensor

    def __init__(self, start: Start, lr: float):
        from crosscode.models.acausal_crosscoder import ModelHookpointAcausalCrosscoder
        from crosscode.models.activations.topk import BatchTopkActivation
        from crosscode.trainers.config_common import AdamConfig
        from crosscode.trainers.topk_crosscoder.config import TopKTrainConfig
        from crosscode.trainers.topk_crosscoder.trainer import TopKStyleAcausalCrosscoderTrainer

        d_sae, n_models, d_in = start.W_dec.shape
        self.dead, never = start.dead, 1_000_000
        self.model = ModelHookpointAcausalCrosscoder(n_models, 1, d_in, d_sae, BatchTopkActivation(start.k))
        data = SimpleNamespace(n_models=n_models, n_hookpoints=1, hookpoints=["resid"])
        data.get_activations_iterator = lambda: iter([self.batch])
        config = TopKTrainConfig(
            batch_size=1, num_steps=never, log_every_n_steps=never, topk_style="batch_topk", k_aux=d_in // 2,
            optimizer=AdamConfig(learning_rate=lr, warmup_pct=0),
        )  # fmt: skip
        run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
        self.trainer = TopKStyleAcausalCrosscoderTrainer(
            config, data, self.model, run, torch.device("cpu"), tempfile.mkdtemp()
        )
        self.trainer.step = 1  # its step 0 logs
        config.num_steps = 1  # of each call of train()
        fill(self.model.W_enc_MPDL, start.W_enc.permute(1, 2, 0)[:, None])
        fill(self.model.b_enc_L, start.b_enc)
        fill(self.model.W_dec_LMPD, start.W_dec[:, :, None])
        fill(self.model.b_dec_MPD, start.b_dec[:, None])
        watch(
            self.trainer, "_calculate_loss_and_log", lambda result: setattr(self, "loss", result[0].detach())
        )

    def keep_dead(self) -> None:
        silent = self.trainer.cfg.dead_latents_threshold_n_examples + 1
        self.trainer.firing_tracker.tokens_since_fired_L[self.dead] = silent

    def step(self, x: Tensor) -> Tensor:
        self.batch = SimpleNamespace(activations_BMPD=x[:, :, None])
        with redirect_stderr(StringIO()):  # its progress bar
            self.trainer.train()
        return self.loss

    @torch.no_grad()
    def l0(self, x: Tensor) -> float:
        return self.model.forward_train(x[:, :, None]).latents_BL.count_nonzero().item() / len(x)


class Llamascopium(Contender):
    """Trainer.fit with its Crosscoder, one step at a time: autocast bf16 as by default, without the metrics of its log.

    BatchTopK chooses for each model by its own decoder norms, so k is the mean number for each model.
    """

    key, title = "llamascopium", "Llamascopium BatchTopK crosscoder"
    loss: Tensor

    def __init__(self, start: Start, lr: float):
        from llamascopium import Crosscoder, CrosscoderConfig, Trainer, TrainerConfig

        if start.dead.any():
            raise Unsupported(
                "its auxiliary loss multiplies [batch, head, d_sae] by [head, d_sae, d_in], which fails"
            )
        d_sae, n_models, d_in = start.W_dec.shape
        self.hooks = [f"model{m}" for m in range(n_models)]
        self.sae = Crosscoder(
            CrosscoderConfig(
                hook_points=self.hooks, d_model=d_in, expansion_factor=(d_sae + 0.5) / d_in, act_fn="batchtopk",
                top_k=start.k, norm_activation="inference",
            )
        )  # fmt: skip
        fill(self.sae.W_E, start.W_enc.permute(1, 2, 0))
        fill(self.sae.b_E, (start.b_enc / n_models).expand(n_models, -1))
        fill(self.sae.W_D, start.W_dec.transpose(0, 1))
        fill(self.sae.b_D, start.b_dec)
        self.trainer = Trainer(
            TrainerConfig(
                lr=lr, l1_coefficient=None, lr_scheduler_name="constant", n_checkpoints=0, total_training_tokens=1,
                skip_metrics_calculation=True, exp_result_path=tempfile.mkdtemp(),
            )
        )  # fmt: skip
        tokens = torch.ones(1)
        self.trainer._initialize_trainer(self.sae, [{"tokens": tokens, "mask": tokens}])
        self.trainer._initialize_optimizer(self.sae)
        self.trainer.cfg.from_pretrained_path = "."  # so that fit() goes on with this optimiser
        watch(self.trainer, "_training_step", lambda result: setattr(self, "loss", result["loss"].detach()))

    def step(self, x: Tensor) -> Tensor:
        batch = {hook: x[:, m] for m, hook in enumerate(self.hooks)} | {"tokens": torch.zeros(len(x))}
        with redirect_stderr(StringIO()):  # its progress bar
            self.trainer.fit(self.sae, [batch])
        return self.loss

    @torch.no_grad()
    def l0(self, x: Tensor) -> float:
        return self.sae.encode(x).count_nonzero().item() / x.shape[1] / len(x)


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)


def watch(owner: object, method: str, see: Callable[[Any], None]) -> None:
    """Show ``see`` what a method returns."""
    original = getattr(owner, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        see(result)
        return result

    setattr(owner, method, watched)


def centred_bias(start: Start) -> Tensor:
    """The encoder's bias for a dictionary that takes the decoder's bias off its input."""
    return start.b_enc + start.W_enc.flatten(1) @ start.b_dec.flatten()


PEERS = [DictionaryLearning, SAELens, SAELensBf16, Sparsify, Crosscode, Llamascopium]
