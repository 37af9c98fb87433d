import inspect
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import tl_crosscoder as tlc
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import BatchTopK, ReLU, TopK
from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.hub.save import load, read_config, save


def crosscoder(sparsity=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normalizer = Normalizer(torch.randn(2, 5, generator=generator), torch.tensor([0.5, 2.0]))
    made = Crosscoder(
        5, 9, sparsity or BatchTopK(2), normalizer=normalizer, code_norm="l2", init=Init(seed=seed)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if isinstance(made.sparsity, BatchTopK):
        made.sparsity.threshold.fill_(0.7)
    return made.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [BatchTopK(2, k_max=4, k_anneal_steps=3), TopK(2), ReLU()])
def test_save_and_load_are_bit_equal(tmp_path, sparsity, dtype):
    saved = crosscoder(sparsity, dtype)
    loaded = load(save(saved, tmp_path / "c"))
    assert loaded.config == saved.config
    assert not loaded.training
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    x = torch.randn(20, 2, 5)
    assert torch.equal(loaded(x).recon, saved(x).recon)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (
            "threshold",
            torch.tensor(0.5),
            "threshold is torch.float32 and W_dec torch.bfloat16.*crosscoder.to",
        ),
        ("threshold", torch.tensor(torch.nan, dtype=torch.bfloat16), "threshold holds NaN or Inf"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved_over_what_can(tmp_path, name, tensor, words):
    saved = crosscoder(dtype=torch.bfloat16)
    folder = save(saved, tmp_path / "c")
    before = (folder / "model.safetensors").read_bytes()
    setattr(saved.sparsity, name, tensor)
    with pytest.raises(ValueError, match=words):
        save(saved, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    load(folder)


def test_a_folded_crosscoder_keeps_its_units(tmp_path):
    folded, x = crosscoder().folded(), torch.randn(20, 2, 5)
    loaded = load(save(folded, tmp_path / "c"))
    assert torch.equal(loaded.decoder_norms(), folded.decoder_norms())
    assert torch.equal(loaded(x).estimate, folded(x).estimate)


def test_a_loaded_crosscoder_can_be_trained(tmp_path):
    loaded = load(save(crosscoder(), tmp_path / "c")).train()
    loaded(torch.randn(8, 2, 5)).recon.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_loaded_crosscoder_outlives_its_file(tmp_path):
    saved = crosscoder()
    loaded = load(save(saved, tmp_path / "c"))
    (tmp_path / "c" / "model.safetensors").write_bytes(
        bytes((tmp_path / "c" / "model.safetensors").stat().st_size)
    )
    assert torch.equal(loaded.b_dec, saved.b_dec)


def test_the_file_has_the_public_layout(tmp_path):
    saved = crosscoder()
    tensors = load_file(save(saved, tmp_path / "c") / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (9, 2, 5), "b_enc": (9,), "W_dec": (9, 2, 5), "b_dec": (2, 5),
        "mean": (2, 5), "scale": (2,), "sparsity.threshold": (),
    }  # fmt: skip
    assert torch.equal(tensors["W_enc"], saved.W_enc_rows)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["format_version"] == 3
    assert config["axes"]["W_enc"] == "d_sae model d_in"
    assert config["models"] == ["base", "tuned"]


def test_extra_words_come_back(tmp_path):
    extra = {"hook": "blocks.1.hook_resid_post", "base": "a", "tuned": "b"}
    assert read_config(save(crosscoder(), tmp_path / "c", extra=extra))["extra"] == extra
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(crosscoder(), tmp_path / "d", extra={"loss": float("nan")})
    assert not (tmp_path / "d").exists()


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    save(crosscoder(seed=0), tmp_path / "c")
    second = crosscoder(seed=1)
    save(second, tmp_path / "c")
    assert torch.equal(load(tmp_path / "c").W_dec, second.W_dec)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_save_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch):
    first = crosscoder(seed=0)
    save(first, tmp_path / "c")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("tl_crosscoder.hub.save.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(crosscoder(seed=1), tmp_path / "c")
    assert torch.equal(load(tmp_path / "c").W_dec, first.W_dec)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("done", [False, True])
def test_a_save_stopped_at_a_rename_leaves_one_whole(tmp_path, monkeypatch, error, failing, done):
    """Ctrl-C comes before a rename, or after it and before anything else."""
    first, second = crosscoder(seed=0), crosscoder(seed=1)
    save(first, tmp_path / "c")
    rename, calls = Path.rename, []

    def stopped(path, target):
        calls.append(path)
        stops = len(calls) - 1 == failing
        if done or not stops:
            rename(path, target)
        if stops:
            raise error

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(type(error)):
        save(second, tmp_path / "c")
    kept = second if failing == 1 and done else first
    assert torch.equal(load(tmp_path / "c").W_dec, kept.W_dec)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_saved_folder_can_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "plain").mkdir()
    saved = save(crosscoder(), tmp_path / "c")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds 'thesis.tex'"):
        save(crosscoder(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_from_the_future_asks_for_an_upgrade(tmp_path):
    save(crosscoder(), tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 4}))
    with pytest.raises(CorruptFile, match=r"format_version 4 is newer than 3.*upgrade tl-crosscoder"):
        load(tmp_path / "c")


#: A config.json as version 1 of the format was written.
VERSION_1 = """{
  "format_version": 1,
  "library_version": "0.1.0",
  "axes": {
    "W_enc": "model d_in d_sae",
    "b_enc": "d_sae",
    "W_dec": "d_sae model d_in",
    "b_dec": "model d_in",
    "mean": "model d_in",
    "scale": "model",
    "units.mean": "model d_in",
    "units.scale": "model"
  },
  "models": ["base", "tuned"],
  "crosscoder": {
    "d_in": 5,
    "d_sae": 9,
    "n_models": 2,
    "sparsity": {
      "name": "batch_topk",
      "k": 2,
      "k_max": null,
      "k_anneal_steps": 0,
      "threshold_start": 0.5,
      "threshold_decay": 0.99
    },
    "code_norm": "l2",
    "init_norm": 0.5,
    "same_init": false,
    "seed": 7,
    "folded": false
  },
  "extra": {"hook": "blocks.1.hook_resid_post"}
}
"""


def turned(folder: Path) -> Path:
    """The folder with its encoder the other way round, as versions 1 and 2 have it."""
    tensors = load_file(folder / "model.safetensors")
    tensors["W_enc"] = tensors["W_enc"].permute(1, 2, 0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_file_of_version_2_still_loads(tmp_path):
    saved, x = crosscoder(), torch.randn(20, 2, 5)
    path = turned(save(saved, tmp_path / "c")) / "config.json"
    config = json.loads(path.read_text())
    with pytest.raises(CorruptFile):  # the axes that the config tells are held to
        load(tmp_path / "c")
    config |= {"format_version": 2, "axes": config["axes"] | {"W_enc": "model d_in d_sae"}}
    path.write_text(json.dumps(config))
    loaded = load(tmp_path / "c")
    assert torch.equal(loaded(x).recon, saved(x).recon) and loaded.config == saved.config


def test_a_file_of_version_1_still_loads(tmp_path):
    saved, x = crosscoder(), torch.randn(20, 2, 5)
    path = turned(save(saved, tmp_path / "c")) / "config.json"
    path.write_text(VERSION_1)
    loaded = load(tmp_path / "c")
    assert torch.equal(loaded(x).recon, saved(x).recon)
    assert loaded.init == Init(norm=0.5, same=False, seed=7)
    assert (loaded.partition, loaded.encoder) == (Partition(), "sum")
    assert read_config(tmp_path / "c")["extra"] == {"hook": "blocks.1.hook_resid_post"}
    again = load(save(loaded, tmp_path / "d"))
    assert again.config == loaded.config
    path.write_text(VERSION_1.replace('"init_norm": 0.5', '"init_norm": 0.5, "hidden": 3'))
    with pytest.raises(CorruptFile, match="no setting 'hidden'"):
        load(tmp_path / "c")


def test_a_version_1_config_without_a_setting_is_refused(tmp_path):
    path = save(crosscoder(), tmp_path / "c") / "config.json"
    path.write_text(VERSION_1.replace('    "init_norm": 0.5,\n', ""))
    with pytest.raises(CorruptFile, match="'init_norm' is missing"):
        load(tmp_path / "c")


def test_a_dictionary_of_one_model_is_saved_as_one_of_the_difference(tmp_path):
    one = Crosscoder(5, 9, TopK(2), n_models=1, encoder="mean").eval()
    loaded, x = load(save(one, tmp_path / "c")), torch.randn(20, 1, 5)
    assert torch.equal(loaded(x).recon, one(x).recon)
    assert read_config(tmp_path / "c")["models"] == ["difference"]


def test_the_public_save_takes_and_passes_on_every_setting(tmp_path):
    """It is written out in the package's first file, and so could fall behind."""
    ours, theirs = (inspect.signature(f).parameters for f in (tlc.save, save))
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}
    crosscoder = Crosscoder(4, 8, ReLU())
    table = pd.DataFrame({"frequency": [0.5] * 8})
    folder = tlc.save(crosscoder, tmp_path / "c", extra={"hook": "h"}, sae_lens=True, table=table)
    assert (folder / "sae_lens" / "sparsity.safetensors").is_file()
    assert read_config(folder)["extra"] == {"hook": "h"}
    assert not (tlc.save(crosscoder, tmp_path / "d", sae_lens=False) / "sae_lens").exists()
