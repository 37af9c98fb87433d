"""Models of unlike width: padded with zeros, trained, read and edited as if each had matrices of its own."""

import shutil
import sys
from contextlib import suppress

import pytest
import torch
from synthetic_runs import small_pair
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from tl_crosscoder import cli
from tl_crosscoder.analysis.decoder_norms import delta_norm
from tl_crosscoder.analysis.latent_scaling import LatentScaling
from tl_crosscoder.analysis.table import latent_table, ranked
from tl_crosscoder.data import data_path
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.difference import difference
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import L1, MSE, AuxK, Delta
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU, TopK
from tl_crosscoder.diffing.config import DiffConfig
from tl_crosscoder.diffing.run import diff, learn
from tl_crosscoder.errors import CorruptFile, PairMismatch, ShapeMismatch
from tl_crosscoder.hub.inspect import inspect
from tl_crosscoder.hub.save import load, save
from tl_crosscoder.interventions import ablate, steer, substitute
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.stream import stream
from tl_crosscoder.studies.attribution import attribution
from tl_crosscoder.studies.causal_equivalence import causal_equivalence
from tl_crosscoder.studies.stability import stability
from tl_crosscoder.studies.substitution import substitution
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train

D, WIDTHS, D_SAE, K, BATCH = 7, (4, 7), 24, 3, 32
APART = Init(norm=0.5, same=False, seed=1)
BEYOND = slice(WIDTHS[0], None)


def draw(seed=0, batch=BATCH, dtype=torch.float64):
    """Correlated activations of a model of 4 dimensions and one of 7, off the origin, and three zeros."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 2, D, generator=torch.Generator().manual_seed(99), dtype=dtype)
    x = torch.einsum("bk,kmd->bmd", torch.randn(batch, 5, generator=generator, dtype=dtype), mixing) + 0.3
    x[:, 0, BEYOND] = 0
    return x


def made(sparsity=None, **arguments):
    return Crosscoder(D, D_SAE, sparsity or BatchTopK(K), init=APART, widths=WIDTHS, **arguments)


def padding(crosscoder):
    """All that lies beyond the first model's width, in weights and normaliser."""
    tensors = (crosscoder.W_enc_rows, crosscoder.W_dec, crosscoder.b_dec, crosscoder.normalizer.mean)
    return torch.cat([tensor.detach()[..., 0, BEYOND].flatten() for tensor in tensors])


class Watch:
    """A loss of nothing, which keeps the weights that each step begins with."""

    name = "watch"

    def __init__(self):
        self.seen = []

    def __call__(self, x, out, crosscoder, progress):
        del x, progress
        self.seen.append({name: p.detach().clone() for name, p in crosscoder.named_parameters()})
        return out.estimate.new_zeros(())


class Naive:
    """Two models with weight matrices of their own widths: dense, autograd, torch's Adam."""

    def __init__(self, crosscoder, k):
        cut = [(m, slice(width)) for m, width in enumerate(WIDTHS)]
        weights = [crosscoder.W_enc_rows, crosscoder.W_dec]
        self.enc, self.dec = ([w.detach()[:, m, s].clone() for m, s in cut] for w in weights)
        self.b_enc = crosscoder.b_enc.detach().clone()
        self.b_dec = [crosscoder.b_dec.detach()[m, s].clone() for m, s in cut]
        self.mean = [crosscoder.normalizer.mean[m, s] for m, s in cut]
        self.scale, self.k = crosscoder.normalizer.scale, k
        self.parameters = [*self.enc, *self.dec, self.b_enc, *self.b_dec]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.adam = torch.optim.Adam(self.parameters, betas=(0.9, 0.999), eps=1e-8)
        self.since = torch.zeros(D_SAE, dtype=torch.long)

    def losses(self, x, l1, auxk):
        y = [(x[:, m, :width] - self.mean[m]) * self.scale[m] for m, width in enumerate(WIDTHS)]
        pre = y[0] @ self.enc[0].T + y[1] @ self.enc[1].T + self.b_enc
        norms = self.dec[0].norm(dim=1) + self.dec[1].norm(dim=1)
        scores = pre.detach().relu() * norms.detach()
        f = pre * (scores >= scores.flatten().topk(self.k * len(x)).values[-1])
        error = [f @ self.dec[m] + self.b_dec[m] - y[m] for m in (0, 1)]
        mse = sum(e.square().sum() for e in error) / len(x)
        dead = (self.since >= auxk.dead_after_tokens).nonzero()[:, 0]
        aux = torch.zeros((), dtype=torch.float64)
        if len(dead):
            k = min(auxk.k_aux, len(dead))
            g = pre[:, dead].relu()
            best = g.detach() * norms.detach()[dead]
            g = g * (best >= best.topk(k, dim=1).values[:, -1:])
            aux = sum((g @ self.dec[m][dead] + error[m].detach()).square().sum() for m in (0, 1)) / len(x)
        self.since = torch.where((f > 0).any(0), 0, self.since + len(x))
        return mse + l1 * (f * norms).sum() / len(x) + auxk.weight * aux, len(dead)

    def step(self, loss, lr, clip):
        self.adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        return norm > clip

    def differs_from(self, weights):
        pairs = [(weights["b_enc"], self.b_enc)]
        for m, width in enumerate(WIDTHS):
            own = (weights[name][..., m, :width] for name in ("W_enc_rows", "W_dec", "b_dec"))
            pairs += zip(own, (self.enc[m], self.dec[m], self.b_dec[m]), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("dense", [False, True])
def test_each_step_of_training_is_that_of_two_models_with_matrices_of_their_own(dense):
    """BatchTopK with AuxK, L1 and the clip; ``dense``: so many active latents that no pairs are looked for."""
    k = 8 if dense else 2
    batches = [draw(seed) for seed in range(8)]
    normalizer = Normalizer.fit(batches, scale="per_model").double()
    crosscoder = made(BatchTopK(k), normalizer=normalizer).double()
    naive = Naive(crosscoder, k)
    config = TrainConfig(
        steps=60, lr=1e-2, warmup_steps=4, b_dec_init="zeros", clip=4.0, log_every=1, progress=False
    )
    watch, auxk = Watch(), AuxK(weight=0.5, k_aux=2, dead_after_tokens=3 * BATCH)
    history = train(crosscoder, batches, [MSE(), L1(0.01, warmup_fraction=0.0), auxk, watch], config)
    dead, clipped = [], []
    for step, weights in enumerate([*watch.seen, {n: p.detach() for n, p in crosscoder.named_parameters()}]):
        assert naive.differs_from(weights) < 1e-12, step
        assert not any(weights[n][..., 0, BEYOND].any() for n in ("W_enc_rows", "W_dec", "b_dec")), step
        if step == config.steps:
            break
        loss, n_dead = naive.losses(batches[step % len(batches)], 0.01, auxk)
        row = history.rows[step]
        assert abs(row["mse"] + row["l1"] + row["auxk"] - loss.item()) < 1e-11, step
        dead.append(n_dead)
        clipped.append(bool(naive.step(loss, config.lr_at(step), config.clip)))
    assert any(clipped)
    assert not all(clipped)
    assert dense or any(0 < n < D_SAE for n in dead)


@pytest.mark.parametrize("moments", ["as weights", "bfloat16"])
@pytest.mark.parametrize("sparsity", [BatchTopK(K), TopK(K), ReLU()])
def test_the_padding_is_exactly_zero_after_training_resuming_and_saving(tmp_path, sparsity, moments):
    batches = [draw(seed, dtype=torch.float32) for seed in range(3)]
    settings = {"steps": 30, "lr": 1e-2, "checkpoint_every": 10, "moments": moments, "progress": False}
    losses = [MSE(), L1(0.01), AuxK(dead_after_tokens=100)]
    normalizer = Normalizer.fit(batches)
    crosscoder = made(sparsity, normalizer=normalizer)
    train(crosscoder, batches, losses, TrainConfig(**settings), checkpoints=tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "step-00000030")
    again = made(sparsity, normalizer=normalizer)
    train(again, batches, losses, TrainConfig(**settings), resume=tmp_path / "c")
    read = load(save(again, tmp_path / "saved"))
    for each in (crosscoder, again, read, again.folded(), load(save(again.folded(), tmp_path / "folded"))):
        assert each.widths == WIDTHS
        assert not padding(each).any()
        assert each.W_dec[:, 0, : BEYOND.start].all()
    assert read.config == again.config
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, crosscoder.state_dict()[name]), name
    if again.sparsity.restricted(torch.tensor([1, 4])) is not None:
        assert again.restricted(torch.tensor([1, 4])).widths == WIDTHS


def test_rows_start_at_their_norm_within_each_models_width():
    crosscoder = made()
    norms = torch.full((D_SAE, 2), 0.5)
    torch.testing.assert_close(crosscoder.decoder_norms().detach(), norms)
    torch.testing.assert_close(crosscoder.W_enc_rows.detach().norm(dim=-1), norms)
    alike = Crosscoder(D, D_SAE, BatchTopK(K), init=APART, widths=(D, D))
    assert torch.equal(alike.W_dec, Crosscoder(D, D_SAE, BatchTopK(K), init=APART).W_dec)
    assert "widths" not in alike.config


@pytest.mark.slow
def test_a_model_that_is_turned_into_a_wider_space_is_found_to_be_the_same():
    """A rotation into more dimensions changes no concept: the calls of tuned-only are as right as without it."""
    pair, wide = small_pair(), 48
    turn = (
        torch.linalg.qr(torch.randn(wide, wide, generator=torch.Generator().manual_seed(5)))
        .Q[:, : pair.d_in]
        .T
    )

    def turned(x):
        return torch.stack([torch.nn.functional.pad(x[:, 0], (0, wide - pair.d_in)), x[:, 1] @ turn], 1)

    batches = [turned(x) for x in pair.batches(512, 0, 60)]
    normalizer = Normalizer.fit(batches, scale="per_model", center=False)
    sizes = [torch.cat([normalizer.normalise(x) for x in batches])[:, m].norm(dim=-1).mean() for m in (0, 1)]
    torch.testing.assert_close(torch.stack(sizes), torch.full((2,), wide**0.5))
    crosscoder = Crosscoder(
        wide, 64, BatchTopK(2, k_max=10, k_anneal_steps=80), init=Init(same=False), widths=(pair.d_in, wide)
    )
    train(crosscoder, batches, [MSE(), AuxK(dead_after_tokens=5000)], TrainConfig(400, 1e-2, progress=False))
    back = Crosscoder(pair.d_in, 64, crosscoder.sparsity)
    with torch.no_grad():
        for ours, theirs in ((back.W_enc_rows, crosscoder.W_enc_rows), (back.W_dec, crosscoder.W_dec)):
            ours.copy_(torch.stack([theirs[:, 0, : pair.d_in], theirs[:, 1] @ turn.T], 1))
        back.b_enc.copy_(crosscoder.b_enc)
        back.b_dec.copy_(torch.stack([crosscoder.b_dec[0, : pair.d_in], crosscoder.b_dec[1] @ turn.T]))
    labels = pair.label(back.eval())
    table = latent_table(crosscoder, [turned(x) for x in pair.batches(2048, 9, 4)])
    score = pair.mark(labels, torch.tensor((table["class"] == "tuned_only").to_numpy()))
    assert score.precision >= 0.9
    assert score.recall >= 0.9
    shared = (labels["kind"] == "shared").to_numpy() & (labels["correlation"] > 0.85).to_numpy()
    assert shared.sum() >= 10
    assert 0.45 < delta_norm(crosscoder.decoder_norms())[shared].median() < 0.55


def test_figures_of_a_model_are_those_without_its_padding():
    crosscoder = (
        made(ReLU(), normalizer=Normalizer.fit([draw(5, 400)], scale="per_model").double()).double().eval()
    )
    x = draw(3, 200)
    table = latent_table(crosscoder, x.split(64))
    y = crosscoder.normalizer.normalise(x)[:, 0, : BEYOND.start]
    recon = (
        crosscoder.encode(x) @ crosscoder.W_dec[:, 0, : BEYOND.start] + crosscoder.b_dec[0, : BEYOND.start]
    )
    fve = 1 - (y - recon).var(0).sum() / y.var(0).sum()
    assert table.attrs["metrics"]["fve_base"] == pytest.approx(fve.item(), abs=1e-12)
    assert not {"difference_share", "rank_score", "nu_error"} & set(table)
    assert table["cosine"].isna().all()
    assert table["delta_norm"].notna().all()
    with pytest.raises(KeyError, match="no column 'rank_score'"):
        ranked(table, "rank_score")


def test_what_takes_one_model_from_the_other_is_refused():
    crosscoder, x = made(ReLU()), draw(dtype=torch.float32)
    acts = x[None, :, 1], x[None, :, 0]
    for refused in (
        lambda: Crosscoder(D, D_SAE, BatchTopK(K), widths=WIDTHS),
        lambda: made(partition=Partition(shared=4)),
        lambda: substitute(crosscoder, [0], acts[1]),
        lambda: ablate(crosscoder, [0], acts[1], part="difference"),
        lambda: LatentScaling(crosscoder),
        lambda: train(crosscoder, [x], [MSE(), Delta(1.0)], TrainConfig(1, progress=False)),
    ):
        with pytest.raises(ShapeMismatch, match=r"models of one width; these have widths \[4, 7\]"):
            refused()
    with pytest.raises(ShapeMismatch, match="pass init=Init"):
        Crosscoder(D, D_SAE, BatchTopK(K), widths=WIDTHS)


@pytest.mark.parametrize("widths", [(4,), (4, 8), (0, 7)])
def test_widths_that_cannot_be_are_refused(widths):
    with pytest.raises(ValueError, match=r"widths wants 2 whole numbers in 1\.\.d_in=7"):
        Crosscoder(D, D_SAE, BatchTopK(K), init=APART, widths=widths)


def test_numbers_in_the_padding_are_refused(tmp_path):
    swapped = draw(dtype=torch.float32).flip(1)
    with pytest.raises(ShapeMismatch, match=r"model 0 should be zero from number 4 on.*swapped"):
        train(made(), [swapped], [MSE()], TrainConfig(1, progress=False))
    with pytest.raises(ShapeMismatch, match="the normaliser's mean of model 0"):
        made(normalizer=Normalizer(torch.ones(2, D), torch.ones(2)))
    crosscoder = made(ReLU())
    with torch.no_grad():
        crosscoder.W_dec[3, 0, 5] = 1e-9
    with pytest.raises(CorruptFile, match="W_dec of model 0 should be zero"):
        load(save(crosscoder, tmp_path / "c"))


# -- two transformers


def narrow_model():
    """A random Llama of the shipped tiny one's tokens, half as wide and of another depth."""
    config = AutoConfig.from_pretrained(data_path("tiny/base"), dtype="float32")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 96, 4
    config.num_attention_heads = config.num_key_value_heads = 2
    config.initializer_range = 0.2
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pair():
    wide = LlamaForCausalLM.from_pretrained(data_path("tiny/base"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(data_path("tiny/base"))
    hook = "blocks.2.hook_resid_post"
    return ModelPair(narrow_model(), wide, hook=hook, tokenizer=tokenizer, unlike=True)


@pytest.fixture(scope="module")
def corpus(pair):
    return Corpus.from_file(data_path("text/novels.txt"), pair.tokenizer).take(6000, seed=0)


@pytest.fixture(scope="module")
def store(pair, corpus, tmp_path_factory):
    return capture(pair, corpus, tmp_path_factory.mktemp("acts"), progress=False)


@pytest.fixture(scope="module")
def crosscoder(store):
    made = Crosscoder(
        store.d_in,
        256,
        BatchTopK(8),
        normalizer=Normalizer.fit(store, scale="per_model"),
        init=Init(norm=0.5, same=False),
        widths=store.widths,
    )
    train(made, store.shuffled(512), [MSE(), AuxK()], TrainConfig(60, 3e-3, progress=False))
    return made


@pytest.fixture(scope="module")
def table(crosscoder, store):
    return latent_table(crosscoder, store)


def test_models_of_other_sizes_are_a_pair_only_where_that_is_said(pair):
    with pytest.raises(PairMismatch, match=r"width 64 and tuned 128.*unlike=True"):
        ModelPair(pair.base, pair.tuned, hook=pair.hook)


def test_a_capture_holds_each_models_own_activations_and_remembers_the_widths(pair, store, corpus):
    assert (store.widths, store.d_in, pair.d_in) == ((64, 128), 128, 128)
    assert type(store).open(store.shards[0].path.parent).widths == (64, 128)
    x = torch.cat(list(store.batches()))
    assert not x[:, 0, 64:].any()
    batch = corpus.batch([0])
    both = pair.capture(batch)
    assert torch.equal(both[:, :, 0, :64], pair.base.capture(batch, pair.hook))
    assert torch.equal(both[:, :, 1], pair.tuned.capture(batch, pair.hook))
    for live, kept in zip(stream(pair, corpus, batch_size=512), store.shuffled(512), strict=True):
        assert torch.equal(live, kept)
    assert stream(pair, corpus, batch_size=512).widths == (64, 128)


def test_a_crosscoder_that_was_not_told_the_widths_is_not_trained(store):
    crosscoder = Crosscoder(128, 64, BatchTopK(8))
    with pytest.raises(ShapeMismatch, match=r"\[64, 128\].*pass Crosscoder\(\.\.\., widths=store\.widths\)"):
        train(crosscoder, store.shuffled(512), [MSE()], TrainConfig(1, progress=False))
    with pytest.raises(ShapeMismatch, match="a difference wants models of one width"):
        difference(store)


def test_the_whole_job_learns_in_both_widths_and_is_refused_before_it_captures(pair, corpus, store, tmp_path):
    settings = {"d_sae": 128, "steps": 3, "batch_size": 128}
    learned, _ = learn(store, DiffConfig(**settings), progress=False)
    assert (learned.widths, learned.init.same) == ((64, 128), 0)
    by_recipe, _ = learn(store, DiffConfig(**settings, recipe="kissane_l1"), progress=False)
    assert by_recipe.widths == (64, 128)
    for shared in ({"recipe": "dsf"}, {"recipe": "minder_batchtopk"}, {"init_same": 0.5}):
        with pytest.raises(ShapeMismatch, match="models of one width"):
            learn(store, DiffConfig(**settings, **shared), progress=False)
    with pytest.raises(ShapeMismatch, match="diff wants models of one width"):
        diff(pair, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_on_such_a_store_and_prints_the_table(store, tmp_path, capsys, monkeypatch):
    acts, saved = store.shards[0].path.parent, tmp_path / "crosscoder"
    sizes = ["--d-sae", "64", "--k", "4", "--steps", "20", "--batch-size", "256"]
    monkeypatch.setattr(sys, "argv", ["tl-crosscoder", "train", str(acts), "--out", str(saved), *sizes])
    with suppress(SystemExit):
        cli.main()
    capsys.readouterr()
    monkeypatch.setattr(
        sys, "argv", ["tl-crosscoder", "table", str(saved), str(acts), "--out", str(tmp_path / "t.parquet")]
    )
    with suppress(SystemExit):
        cli.main()
    assert "delta_norm" in capsys.readouterr().out
    assert load(saved).widths == (64, 128)
    assert any("widths [64, 128]" in note for note in inspect(saved).conventions.notes)


def test_two_transformers_of_unlike_width_are_captured_trained_on_and_told_apart(crosscoder, table):
    metrics = table.attrs["metrics"]
    assert metrics["fve_base"] > 0.3
    assert metrics["fve_tuned"] > 0.3
    assert set(table["class"]) & {"shared", "other"}
    crosscoder.check_padding()
    assert crosscoder.W_dec[:, 0, :64].any()


@pytest.mark.parametrize(("side", "model", "width"), [("base", 0, 64), ("tuned", 1, 128)])
def test_each_model_is_edited_in_its_own_width(pair, corpus, crosscoder, table, side, model, width):
    batch, latents = corpus.batch([0, 1]), ranked(table, "frequency")[:5]
    both = pair.capture(batch)
    own, other = both[:, :, model, :width], both[:, :, 1 - model]
    # steering: the raw decoder row of this model, and nothing else
    row = crosscoder.raw_rows().detach()[latents[0], model, :width]
    torch.testing.assert_close(steer(crosscoder, latents[:1], 3.0, model=model)(own), own + 3 * row)
    clean, steered = (
        pair.run(batch, side=side),
        pair.run(batch, steer(crosscoder, latents[:1], 3.0, model=model), side),
    )
    assert (steered - clean).abs().max() > 0.01
    # ablating: what the codes of both models say, the other's padded or as it is
    codes = crosscoder.encode(both.flatten(0, 1))[:, latents].unflatten(0, own.shape[:2])
    wanted = own - codes @ crosscoder.raw_rows().detach()[latents, model, :width]
    for theirs in (other, other[..., : crosscoder.widths[1 - model]]):
        torch.testing.assert_close(
            ablate(crosscoder, latents, theirs, model=model)(own), wanted, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ShapeMismatch, match="must be of the same tokens"):
        ablate(crosscoder, latents, other[..., :50], model=model)(own)
    # while generating, the other model reads along
    prompt = corpus.batch([0, 1], pad="left")
    say = lambda **how: pair.generate(
        prompt, 4, lambda acts: ablate(crosscoder, latents, acts, model=model, **how), side=side
    )
    assert torch.equal(say(scale=1.0), pair.generate(prompt, 4, side=side))
    assert say().shape == (2, 4)


def test_studies_within_the_models_run_and_those_across_them_are_refused(
    pair, corpus, store, crosscoder, table
):
    latents = ranked(table, "frequency")[:2]
    found = causal_equivalence(
        crosscoder, pair, store, table, latents=latents, n_probes=8, n_bootstrap=20, progress=False
    )
    assert found.table["mean_kl_base"].gt(0).all()
    assert found.table["mean_kl_tuned"].gt(0).all()
    attributed = attribution(crosscoder, pair, corpus.batch([0]), [5], [6], top=2)
    assert {"exact_base", "exact_tuned"} <= set(attributed.table)
    with pytest.raises(ShapeMismatch, match="the change from base to tuned wants models of one width"):
        substitution(crosscoder, pair, corpus, table, ranking="delta_norm")
    with pytest.raises(
        ShapeMismatch, match="the rotation of one side's directions wants models of one width"
    ):
        stability(crosscoder, crosscoder, progress=False)
