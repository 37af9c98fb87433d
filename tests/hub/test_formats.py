"""Every known format gives the codes and reconstructions of its source's own formula, in float64."""

import format_writers as writers
import pytest
import torch

from tl_crosscoder.hub.load import load, origin
from tl_crosscoder.hub.save import save

dl = writers.dictionary_learning
CASES = {
    "dictionary_learning L1": lambda p: dl(p, batch_topk=False, normaliser=False),
    "dictionary_learning L1, normalised": lambda p: dl(p, batch_topk=False),
    "dictionary_learning BatchTopK": dl,
    "dictionary_learning BatchTopK without a normaliser": lambda p: dl(p, normaliser=False),
    "dictionary_learning SAE norm": lambda p: dl(p, norm="SAE"),
    "dictionary_learning MIXED norm": lambda p: dl(p, norm="MIXED"),
    "dictionary_learning MIXED norm, a latent without decoders": lambda p: dl(p, norm="MIXED", dead=[3]),
    "dictionary_learning NONE norm": lambda p: dl(p, norm="NONE"),
    "dictionary_learning DECOUPLED norm": lambda p: dl(p, norm="DECOUPLED", normaliser=False),
    "dictionary_learning L1, DECOUPLED norm": lambda p: dl(p, norm="DECOUPLED", batch_topk=False),
    "dictionary_learning compiled .pt": lambda p: dl(p, name="model_final.pt", prefix="_orig_mod."),
    "dictionary_learning reading one model": lambda p: dl(p, inputs=[1]),
    "dictionary_learning keys in another's file": lambda p: dl(p, name="cc_weights.pt"),
    "ckkissane": writers.kissane,
    "ckkissane, decoder the other way": lambda p: writers.kissane(p, dec_order="MFD"),
    "ckkissane safetensors": lambda p: writers.kissane(p, name="cc_weights.safetensors"),
    "OpenInterpretability": writers.papergrade,
    "Antebe DFC": writers.antebe,
    "crosscode JumpReLU": writers.crosscode,
    "crosscode ReLU": lambda p: writers.crosscode(p, kind="relu", biases=False),
    "crosscode TopK": lambda p: writers.crosscode(p, kind="topk"),
    "crosscode BatchTopK": lambda p: writers.crosscode(p, kind="batchtopk"),
    "crosscode GroupMax": lambda p: writers.crosscode(p, kind="groupmax"),
    "crosscode, three hook points of one model": lambda p: writers.crosscode(p, models=1, points=3),
    "Llamascopium ReLU": writers.llamascopium,
    "Llamascopium ReLU, a head padded": lambda p: writers.llamascopium(p, padded=2),
    "Llamascopium ReLU, raw activations": lambda p: writers.llamascopium(p, how="none"),
    "Llamascopium .pt": lambda p: writers.llamascopium(p, name="sae_weights.pt"),
    "Llamascopium JumpReLU, equal norms": lambda p: writers.llamascopium(p, act="jumprelu", same_norms=True),
    "Llamascopium JumpReLU, a gate for each head": lambda p: writers.llamascopium(p, act="jumprelu"),
    "Llamascopium TopK, a gate for each head": lambda p: writers.llamascopium(p, act="topk"),
    "Llamascopium TopK, equal norms": lambda p: writers.llamascopium(p, act="topk", same_norms=True),
    "OPD, three widths": writers.heterogeneous,
    "OPD, one width": lambda p: writers.heterogeneous(p, widths=(4, 4), normaliser=False),
    "SAE-Lens layers": writers.sae_lens_layers,
    "SAE-Lens layers, b_dec left": lambda p: writers.sae_lens_layers(p, subtract=False),
    "SAE-Lens layers, top-k": lambda p: writers.sae_lens_layers(p, act="topk"),
    "SAE-Lens concatenated": writers.sae_lens_flat,
    "SAE-Lens concatenated JumpReLU": lambda p: writers.sae_lens_flat(p, architecture="jumprelu_crosscoder"),
    "lisannbecker, two widths": writers.two_widths,
}
WIDTHS = {
    "Llamascopium ReLU, a head padded": (5, 3),
    "OPD, three widths": (5, 3, 4),
    "lisannbecker, two widths": (5, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_codes_and_reconstructions_are_those_of_the_source(tmp_path, case):
    written = CASES[case](tmp_path / "c")
    crosscoder = load(written.path, **written.given)
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(40, crosscoder.n_models, crosscoder.d_in, generator=generator, dtype=torch.float64)
    for i, d in enumerate(WIDTHS.get(case, ())):  # the narrower models' activations are padded with zeros
        x[:, i, d:] = 0
    acts, recon = written.formula(x)
    assert not crosscoder.training
    assert crosscoder.widths == WIDTHS.get(case, (crosscoder.d_in,) * crosscoder.n_models)
    assert torch.allclose(crosscoder.encode(x), acts, atol=1e-6)
    assert torch.allclose(crosscoder(x).recon, recon, rtol=1e-6, atol=1e-6)
    ours = load(save(crosscoder, tmp_path / "ours"))
    assert ours.widths == crosscoder.widths
    assert torch.equal(ours.encode(x), crosscoder.encode(x))
    share = (acts > 0).double().mean()
    assert 0.02 < share < 0.98, "an example in which nothing or everything is active shows nothing"


def test_a_cast_to_bfloat16_is_that_of_the_weights(tmp_path):
    written = dl(tmp_path / "c", dtype=torch.float32)
    plain, small = load(written.path), load(written.path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in small.state_dict().values()} == {torch.bfloat16}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor.bfloat16()), name


def test_base_comes_first_also_where_the_file_has_tuned_first(tmp_path):
    written = writers.antebe(tmp_path / "c")
    crosscoder = load(written.path, scale=1)
    assert torch.equal(crosscoder.W_dec[:, 1], written.tensors["W_dec"][:, 0])
    # latents 0 and 1 are the tuned model's own, 2 to 4 the base model's
    assert not crosscoder.W_dec[:2, 0].any()
    assert not crosscoder.W_dec[2:5, 1].any()
    assert "swapped" in origin(crosscoder).conventions.models


def test_k_is_the_tensors_where_the_settings_say_otherwise(tmp_path):
    crosscoder = load(dl(tmp_path / "c").path)
    assert crosscoder.sparsity.k == 3
    assert any("k=100" in note for note in origin(crosscoder).conventions.notes)
