"""code_norm="decoupled": each model chooses for itself, against a naive reference in float64."""

import numpy as np
import pytest
import torch

from tl_crosscoder.analysis.base import run
from tl_crosscoder.analysis.difference_share import DifferenceShare
from tl_crosscoder.analysis.latent_scaling import latent_scaling
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.losses import MSE, AuxK, Progress
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, JumpReLU, PerModel, Split, Threshold, TopK
from tl_crosscoder.hub.save import load, save
from tl_crosscoder.interventions import ablate, substitute
from tl_crosscoder.studies.dictionaries import Dictionary
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.train import train
from tl_crosscoder.types import BASE, TUNED

D_IN, D_SAE, BATCH, K = 5, 24, 16, 3


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def crosscoder(sparsity=None, same=False, dtype=torch.float64, **settings):
    made = Crosscoder(
        D_IN,
        D_SAE,
        sparsity or BatchTopK(K, threshold_start=0.0),
        code_norm="decoupled",
        normalizer=Normalizer(torch.randn(2, D_IN), torch.tensor([0.5, 2.0])),
        init=Init(norm=0.5, same=same, seed=3),
        **settings,
    )
    with torch.no_grad():
        made.W_dec.mul_(torch.rand(D_SAE, 1 if same else 2, 1) + 0.2)
        made.b_enc.normal_(0, 0.1)
        made.b_dec.normal_()
    return made.to(dtype)


def acts(seed=0, n=BATCH):
    return torch.randn(n, 2, D_IN, generator=torch.Generator().manual_seed(seed)).double() * 2


def trained(**settings):
    made = crosscoder(**settings)
    train(made, [acts(seed) for seed in range(20)], [MSE()], TrainConfig(20, lr=1e-3, progress=False))
    return made


def naive_codes(made, x, keep):
    """Activations, and the gates of each model: ``keep`` says which of one model's scores stay."""
    y = (x - made.normalizer.mean) * made.normalizer.scale[:, None]
    pre = torch.einsum("bmd,smd->bs", y, made.W_enc_rows) + made.b_enc
    norms = made.W_dec.norm(dim=-1)
    gates = torch.stack([keep(pre.detach().relu() * norms[:, m].detach(), m) for m in range(2)], -1)
    return y, pre, gates & (pre.detach() > 0)[..., None]


def largest(scores, _):
    bar = scores.flatten().sort(descending=True).values[K * len(scores) - 1]
    return scores >= bar


def above_threshold(made):
    return lambda scores, m: scores > thresholds_of(made)[m]


def thresholds_of(made):
    assert isinstance(made.sparsity, PerModel)
    return [part.get_buffer("threshold").item() for part in made.sparsity.parts]


def gates_of(codes):
    assert codes.gates is not None
    return codes.gates


def naive_estimate(made, pre, gates):
    return torch.einsum("bs,bsm,smd->bmd", pre, gates.double(), made.W_dec) + made.b_dec


def test_each_model_keeps_its_own_largest_scores():
    made, x = crosscoder().train(), acts()
    out = made(x)
    y, pre, gates = naive_codes(made, x, largest)
    assert gates[..., BASE].sum() == gates[..., TUNED].sum() == K * BATCH
    assert (gates[..., BASE] != gates[..., TUNED]).any()
    torch.testing.assert_close(out.target, y)
    torch.testing.assert_close(out.acts, pre * gates.any(-1))
    torch.testing.assert_close(out.estimate, naive_estimate(made, pre, gates))


def test_gradients_are_those_of_the_naive_sum():
    made, x = crosscoder().train(), acts()
    out = made(x)
    MSE()(x, out, made, Progress(0, 1, 0, torch.zeros(D_SAE).long())).backward()
    ours = {name: p.grad for name, p in made.named_parameters()}
    made.zero_grad()
    y, pre, gates = naive_codes(made, x, largest)
    (naive_estimate(made, pre, gates) - y).square().sum().div(BATCH).backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(
            ours[name], p.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n} {m}"
        )


def test_with_equal_norms_it_is_the_ordinary_choice():
    made, x = crosscoder(same=True).train(), acts()
    plain = Crosscoder(D_IN, D_SAE, BatchTopK(K), normalizer=made.normalizer).double().train()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(made.get_parameter(name))
    a, b = made(x), plain(x)
    torch.testing.assert_close(a.acts, b.acts)
    torch.testing.assert_close(a.recon, b.recon)


def test_stretching_the_encoder_against_the_decoder_changes_no_reconstruction():
    made, x = crosscoder().train(), acts()
    before = made(x).recon
    with torch.no_grad():
        made.W_dec[2] *= 4
        made.W_enc_rows[2] /= 4
        made.b_enc[2] /= 4
    torch.testing.assert_close(made(x).recon, before)


def test_in_evaluation_each_model_has_a_threshold_and_dense_and_sparse_codes_decode_alike():
    made, x = trained().eval(), acts(50)
    thresholds = thresholds_of(made)
    assert thresholds[0] != thresholds[1]
    _, pre, gates = naive_codes(made, x, above_threshold(made))
    assert (gates[..., BASE] != gates[..., TUNED]).any()
    expected = made.normalizer.denormalise(naive_estimate(made, pre, gates))
    torch.testing.assert_close(made.decode(made.encode_sparse(x)), expected)
    torch.testing.assert_close(made.decode(made.encode(x)), expected)
    torch.testing.assert_close(made(x).recon, expected)
    torch.testing.assert_close(made.folded()(x).recon, expected)


def test_it_is_saved_and_loaded_as_it_was(tmp_path):
    made = trained(dtype=torch.float32)
    save(made, tmp_path / "made")
    again = load(tmp_path / "made")
    x = acts(7).float()
    assert again.code_norm == "decoupled"
    assert again.config == made.config
    assert torch.equal(again.eval()(x).recon, made.eval()(x).recon)


def test_some_latents_alone_are_what_they_are_among_all():
    made, x = trained().eval(), acts(8)
    some = torch.tensor([1, 4, 9, 20])
    few = made.restricted(some)
    torch.testing.assert_close(few.encode(x), made.encode(x)[:, some])
    whole = made.encode_sparse(x)
    torch.testing.assert_close(few.decode(few.encode_sparse(x)), made.decode(whole.only(some)))


def test_prefixes_and_parts_write_into_each_model_what_it_chose():
    made, x = trained().eval(), acts(9)
    codes, rows = made.encode_sparse(x), made.decoder_rows()
    prefixes = codes.decode_prefixes(rows, [7, D_SAE])
    torch.testing.assert_close(prefixes[0], codes.only(slice(7)).decode(rows))
    torch.testing.assert_close(prefixes[1], codes.decode(rows))


def test_the_auxiliary_loss_and_training_run_to_the_same_bytes():
    losses = [MSE(), AuxK(dead_after_tokens=40)]
    config = TrainConfig(30, lr=1e-2, progress=False)
    torch.manual_seed(0)
    a = crosscoder()
    torch.manual_seed(0)
    b = crosscoder()
    for made in (a, b):
        history = train(made, [acts(seed) for seed in range(30)], losses, config)
    assert (
        history.rows[-1]["mse"]
        < train(crosscoder(), [acts(0)], losses, TrainConfig(1, progress=False)).rows[0]["mse"]
    )
    for name, weights in a.state_dict().items():
        assert torch.equal(weights, b.state_dict()[name]), name


def test_an_edit_removes_from_a_model_what_it_has_there_alone():
    made = trained().eval().float()
    h = acts(10, n=6).float().view(2, 3, 2, D_IN)
    _, pre, gates = naive_codes(made, h.flatten(0, 1), above_threshold(made))
    f = (pre[..., None] * gates).detach()
    rows, some = made.raw_rows().detach(), [0, 3, 8, 11]
    written = torch.einsum("bsm,smd->bsmd", f, rows)[:, some].sum(1).view(2, 3, 2, D_IN)
    whole = ablate(made, some, h[:, :, BASE])(h[:, :, TUNED])
    torch.testing.assert_close(whole, h[:, :, TUNED] - written[:, :, TUNED])
    change = written[:, :, TUNED] - written[:, :, BASE]
    specific = ablate(made, some, h[:, :, BASE], part="difference")(h[:, :, TUNED])
    torch.testing.assert_close(specific, h[:, :, TUNED] - change)
    put = substitute(made, some, h[:, :, BASE])(h[:, :, TUNED])
    torch.testing.assert_close(put, h[:, :, BASE] + change)
    studied, chosen = Dictionary(made), torch.zeros(D_SAE, dtype=torch.bool)
    chosen[some] = True
    codes = studied.codes(h.flatten(0, 1))
    torch.testing.assert_close(studied.written(codes, chosen), change.flatten(0, 1))
    added = studied.written(codes, chosen, additive=True)
    torch.testing.assert_close(added, written[:, :, TUNED].flatten(0, 1))


def test_what_writes_one_row_for_all_models_is_refused():
    made = trained().eval()
    codes = made.encode_sparse(acts(1))
    with pytest.raises(ValueError, match=r"decode rows \[d_sae, model=2"):
        codes.decode(made.raw_rows()[:, TUNED])


def test_single_activations_know_the_models_they_write_into():
    made, x = trained().eval(), acts(11)
    codes = made.encode_sparse(x)
    strengths = made.strengths(codes.values, codes.latents)
    torch.testing.assert_close(strengths, codes.values[:, None] * gates_of(codes))


def test_analyses_count_what_each_model_has():
    made = trained().eval()
    x = torch.cat([acts(seed) for seed in range(12, 16)])
    y, pre, gates = naive_codes(made, x, above_threshold(made))
    f = (pre[..., None] * gates).detach().numpy()
    union, decoder, y = f.max(-1), made.W_dec.detach().numpy(), y.detach().numpy()
    error = y - naive_estimate(made, pre, gates).detach().numpy()
    shares = DifferenceShare(made)
    run(made, [x], [shares])
    columns, nu = shares.columns(), latent_scaling(made, [x])
    total = ((y[:, TUNED] - y[:, BASE]) ** 2).sum()
    for j in np.flatnonzero(union.any(0)):
        written = f[:, j, TUNED, None] * decoder[j, TUNED] - f[:, j, BASE, None] * decoder[j, BASE]
        share = (written * (y[:, TUNED] - y[:, BASE])).sum() / total
        assert columns["difference_share"][j].item() == pytest.approx(share, rel=1e-6, abs=1e-9)
        assert columns["difference_peak"][j].item() == pytest.approx(
            np.linalg.norm(written, axis=1).max(), rel=1e-5
        )
        design = (union[:, j, None] * decoder[j, TUNED]).reshape(-1, 1)
        for m, side in enumerate(("base", "tuned")):
            target = error[:, m] + f[:, j, m, None] * decoder[j, m]
            beta = np.linalg.lstsq(design, target.reshape(-1), rcond=None)[0][0]
            assert nu[f"beta_error_{side}"][j].item() == pytest.approx(beta, rel=1e-6, abs=1e-9)


def test_thresholds_and_numbers_of_latents_may_differ_between_the_models():
    parts = (Threshold.of(torch.full((D_SAE,), 0.2)), Threshold.of(torch.full((D_SAE,), 1.5)))
    made, x = crosscoder(PerModel(parts)).eval(), acts(20)
    _, _, gates = naive_codes(made, x, lambda s, m: s / made.W_dec[:, m].norm(dim=-1) > (0.2, 1.5)[m])
    torch.testing.assert_close(gates_of(made.encode_sparse(x)).sum(0), gates.sum((0, 1)))
    top = gates_of(crosscoder(PerModel((TopK(2), TopK(5)))).eval().encode_sparse(x))
    assert top.sum(0).tolist() == [2 * BATCH, 5 * BATCH]


def test_a_choice_for_each_model_belongs_to_its_code_norm():
    parts = (BatchTopK(2), BatchTopK(3))
    with pytest.raises(ValueError, match="is for code_norm='decoupled'"):
        Crosscoder(D_IN, D_SAE, PerModel(parts))
    with pytest.raises(ValueError, match="as many models"):
        Crosscoder(D_IN, D_SAE, PerModel(parts), n_models=3, code_norm="decoupled")
    with pytest.raises(ValueError, match="for each of two or more"):
        PerModel((parts[0], parts[0]))
    with pytest.raises(ValueError, match="choose by a score"):
        PerModel((JumpReLU(), JumpReLU()))
    with pytest.raises(ValueError, match="choose by a score"):  # nor in eval(), where it would choose by one
        PerModel((JumpReLU().eval(), Split(3, JumpReLU(), BatchTopK(2)).eval()))
