"""Crosscoders trained by SAE-Lens' own trainer and runner."""

import json
import signal

import pytest
import torch

from tests.hub.sae_lens_cases import NEEDS_SAE_LENS, sae_lens
from tests.models.tiny_models import tiny_llama_model, word_tokenizer
from tl_crosscoder.analysis.decoder_norms import delta_norm
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.synthetic import SyntheticPair
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.hub.load import load
from tl_crosscoder.hub.sae_lens.artifact import read_sae_lens
from tl_crosscoder.hub.sae_lens.convert import to_sae_lens
from tl_crosscoder.hub.sae_lens.joint import joint
from tl_crosscoder.hub.sae_lens.training import sae_lens_config, sae_lens_training, side_by_side
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.pair import ModelPair

pytestmark = [NEEDS_SAE_LENS, pytest.mark.filterwarnings("ignore")]


def raw_batches(n=7, rows=32):
    """A list [batch, model, d_in], shorter than a training, of models of different scales."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(rows, 2, 6, generator=generator) * torch.tensor([1.0, 5.0])[:, None] for _ in range(n)
    ]


NORMALIZER = Normalizer(torch.full((2, 6), 0.1), torch.tensor([1.0, 0.2]))


def normalised(first=0):
    return side_by_side(raw_batches(), NORMALIZER, first=first)


def trainer(steps, batches, sae, folder=None, rows=32, lr=1e-3):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    settings = {
        "n_checkpoints": 0,
        "checkpoint_path": folder and str(folder),
        "save_final_checkpoint": folder is not None,
        "total_training_samples": steps * rows,
        "device": "cpu",
        "autocast": False,
        "lr": lr,
        "lr_end": lr / 10,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "train_batch_size_samples": rows,
        "dead_feature_window": 3,
        "feature_sampling_window": 100,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return SAETrainer(SAETrainerConfig(**settings), sae, batches)


def untrained(**settings):
    torch.manual_seed(0)
    sae = sae_lens_training(sae_lens_config(6, 12, 3, **settings))
    with torch.no_grad():  # decoders of many norms, different in the two models
        sae.W_dec *= 3 * torch.rand(12, 1) + 0.2
        sae.W_dec[:, :6] *= 2
    return sae


@pytest.mark.parametrize("code_norm", ["sum", "l2"])
def test_every_place_weighs_by_the_same_norm(code_norm):
    """Codes are p · norm, and what decoding and the auxiliary loss write is p · d: a norm that is √2 off would show."""
    sae, x = untrained(code_norm=code_norm), torch.randn(32, 12)
    halves = sae.W_dec.unflatten(1, (2, 6)).norm(dim=-1)
    norms = halves.sum(-1) if code_norm == "sum" else halves.norm(dim=-1)
    codes, pre = sae.encode_with_hidden_pre(x)
    p = x @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(pre, p * norms)
    active = codes > 0
    assert active.sum() == 96  # 3 a token
    torch.testing.assert_close(codes, (p * norms).where(active, 0))
    torch.testing.assert_close(sae.decode(codes), p.where(active, 0) @ sae.W_dec + sae.b_dec)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[2, 7]] = True
    found = sae.calculate_topk_aux_loss(x, torch.zeros_like(x), pre, dead)
    # both dead latents are used whatever their sign; 2 of 6 wanted ones: a third of the loss
    wanted = (p[:, dead] @ sae.W_dec[dead] - x).square().sum(-1).mean() / 3
    torch.testing.assert_close(found, wanted)


def test_the_stock_trainer_trains_on_captured_activations_and_goes_on_where_it_stopped(tmp_path):
    """10 steps and 10 more are 20, bit for bit, over the end of the store and the start of its next epoch."""
    pair = ModelPair(tiny_llama_model(0), tiny_llama_model(1), hook="blocks.1.hook_resid_post")
    ids = torch.randint(3, 61, (64, 8), generator=torch.Generator().manual_seed(2))
    store = capture(pair, ids, progress=False)
    fitted = Normalizer.fit(store, scale="per_model")
    assert len(store.shuffled(32)) < 20

    def batches(first=0):
        return side_by_side(store.shuffled(32, seed=1), fitted, first=first)

    def fresh():
        torch.manual_seed(0)
        return sae_lens_training(sae_lens_config(16, 24, 3))

    whole, half, rest = fresh(), fresh(), fresh()
    trainer(20, batches(), whole).fit()
    trainer(10, batches(), half, tmp_path).fit()
    [checkpoint] = [path.parent for path in tmp_path.rglob("trainer_state.pt")]
    going_on = trainer(20, iter(()), rest)
    going_on.load_trainer_state(checkpoint)
    rest.load_weights_from_checkpoint(checkpoint)
    going_on.data_provider = batches(first=going_on.n_training_steps)
    going_on.fit()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], tensor), name
    assert not torch.equal(whole.W_dec, half.W_dec)
    with pytest.raises(TypeError, match=r"pass store\.shuffled"):
        side_by_side(store)


def test_what_the_trainer_reads_is_normalised_side_by_side_and_without_end():
    """By hand; after the seventh batch of a list comes its first."""
    read, raw = side_by_side(raw_batches(), NORMALIZER), raw_batches()
    for n in range(16):
        x = raw[n % 7]
        wanted = torch.cat([x[:, 0] - 0.1, (x[:, 1] - 0.1) * 0.2], dim=1)
        torch.testing.assert_close(next(read), wanted)
    assert torch.equal(next(side_by_side(raw)), raw[0].flatten(1))
    assert torch.equal(next(side_by_side(raw, first=9)), raw[2].flatten(1))
    with pytest.raises(EmptyData, match="ended after 7 of"):
        list(side_by_side(iter(raw)))


@pytest.mark.parametrize("code_norm", ["sum", "l2"])
def test_the_stock_trainer_finds_what_is_only_in_one_model(code_norm):
    """16 concepts in both models, 5 in base and 5 in tuned alone, base shifted and tuned five times as large: each is one latent's,
    and Δnorm has three peaks, at ½, 0 and 1."""
    planted = SyntheticPair(d_in=32, n_shared=16, n_weak=0, n_base=5, n_tuned=5, n_decoupled=0, p=0.08)
    shift, size = torch.tensor([3.0, 0.0])[:, None], torch.tensor([1.0, 5.0])[:, None]
    fitted = Normalizer.fit([x * size + shift for x in planted.batches(512, seed=1, n=8)], scale="per_model")
    torch.manual_seed(0)
    sae = sae_lens_training(sae_lens_config(32, 40, 2, code_norm=code_norm))
    batches = (x * size + shift for x in planted.batches(512))
    trainer(600, side_by_side(batches, fitted), sae, rows=512, lr=1e-2).fit()

    crosscoder = sae.crosscoder(fitted)
    share = delta_norm(crosscoder.decoder_norms())
    # the same crosscoder on the planted pair's own activations, neither shifted nor scaled
    bare = sae.crosscoder(Normalizer((fitted.mean - shift) / size, fitted.scale * size[:, 0]))
    found = planted.recovery(bare)
    assert found["correlation"].min() > 0.9
    for kind, where in {"shared": 0.5, "base": 0.0, "tuned": 1.0}.items():
        own = share[found.loc[found["kind"] == kind, "latent"].to_numpy()]
        assert len(own) == {"shared": 16, "base": 5, "tuned": 5}[kind]
        torch.testing.assert_close(own, torch.full_like(own, where), atol=0.06, rtol=0)
    called = (share > 0.9) & torch.from_numpy((planted.label(bare)["kind"] != "dead").to_numpy())
    score = planted.score(bare, called)
    assert (score.precision, score.recall) == (1.0, 1.0)


@pytest.mark.parametrize("code_norm", ["sum", "l2"])
def test_what_was_trained_is_what_is_exported(tmp_path, code_norm):
    """Three ways out: SAE-Lens' export, ours, and ours with the models' scales folded in; none changes what is trained."""
    sae = untrained(code_norm=code_norm)
    trainer(20, normalised(), sae).fit()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    y = torch.randn(50, 12)
    _, pre = sae.encode_with_hidden_pre(y)
    kept = pre.where(pre > sae.topk_threshold, 0)
    recon = (kept / sae.code_norms()) @ sae.W_dec + sae.b_dec
    assert 0 < (kept > 0).float().mean() < 1

    sae.save_inference_model(tmp_path / "c")
    plain = sae_lens().SAE.load_from_disk(tmp_path / "c")
    torch.testing.assert_close(plain.encode(y), kept, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(y), recon, atol=1e-5, rtol=1e-5)
    row_alone = torch.cat([plain.encode(row[None]) for row in y])
    torch.testing.assert_close(row_alone, plain.encode(y), atol=1e-6, rtol=1e-6)
    loaded = read_sae_lens(tmp_path / "c")
    torch.testing.assert_close(loaded(y.view(-1, 2, 6)).recon.flatten(1), recon, atol=1e-5, rtol=1e-5)

    normalizer = Normalizer(torch.randn(2, 6), torch.tensor([0.5, 3.0]))
    crosscoder = sae.crosscoder(normalizer)
    x = normalizer.denormalise(y.view(-1, 2, 6))
    raw = normalizer.denormalise(recon.view(-1, 2, 6))
    torch.testing.assert_close(crosscoder(x).recon, raw, atol=1e-4, rtol=1e-4)
    folded = to_sae_lens(crosscoder, hook="blocks.0.hook_resid_post")
    torch.testing.assert_close(folded(x.flatten(1)), raw.flatten(1), atol=1e-4, rtol=1e-4)
    expected = delta_norm(sae.W_dec.unflatten(1, (2, 6)).norm(dim=-1))
    torch.testing.assert_close(delta_norm(crosscoder.decoder_norms()), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_settings_that_a_crosscoder_cannot_take_are_refused():
    for wrong in (
        {"normalize_activations": "expected_average_only_in"},
        {"normalize_activations": "covariance_whitening"},
    ):
        with pytest.raises(ValueError, match=r"hand it to \.crosscoder"):
            sae_lens_config(6, 12, 3, **wrong)
    for wrong in (
        {"rescale_acts_by_decoder_norm": False},
        {"use_sparse_activations": True},
        {"apply_b_dec_to_input": True},
    ):
        with pytest.raises(ValueError, match="leave rescale_acts_by_decoder_norm=True"):
            sae_lens_config(6, 12, 3, **wrong)


def test_the_runner_trains_on_both_models_run_as_one_and_leaves_a_crosscoder(tmp_path):
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig

    hook = "blocks.1.hook_resid_post"
    pair = ModelPair(tiny_llama_model(0), tiny_llama_model(1), hook=hook, tokenizer=word_tokenizer())
    rows = torch.randint(3, 61, (64, 8), generator=torch.Generator().manual_seed(2)).tolist()
    config = LanguageModelSAERunnerConfig(
        sae=sae_lens_config(16, 24, 4),
        model_name="joint",
        hook_name=hook,
        dataset_path="none",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=8,
        training_tokens=640,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        train_batch_size_tokens=32,
        lr=1e-3,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(tmp_path / "out"),
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    data = Dataset.from_dict({"tokens": rows})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=joint(pair)).run()
    finally:  # the runner leaves its own behind
        for number, handler in handlers.items():
            signal.signal(number, handler)
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text(), parse_constant=pytest.fail)
    assert cfg["metadata"]["hook_name"] == hook  # and so it attaches to both models run as one
    assert {"sparsity.safetensors", "runner_cfg.json"} < {path.name for path in (tmp_path / "out").iterdir()}
    crosscoder = load(tmp_path / "out")
    x = pair.capture(torch.tensor(rows[:4])).flatten(0, 1)
    plain = sae_lens().SAE.load_from_disk(tmp_path / "out")
    torch.testing.assert_close(crosscoder(x).recon.flatten(1), plain(x.flatten(1)), atol=1e-4, rtol=1e-4)
    assert crosscoder.encode(x).any()
    assert torch.isfinite(joint(pair).run_with_saes(torch.tensor(rows[:2]), saes=[plain])).all()
