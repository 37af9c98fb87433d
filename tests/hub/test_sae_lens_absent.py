"""Without SAE-Lens: what works all the same, what says which extra it wants, and where it is installed and broken."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tl_crosscoder

#: Its packages look for ``sae_lens`` as if it had never been installed.
HIDDEN = """
import sys
from importlib.machinery import PathFinder

class WithoutSaeLens(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "sae_lens" else super().find_spec(name, path, target)

sys.meta_path = [WithoutSaeLens if finder is PathFinder else finder for finder in sys.meta_path]
"""
#: As where TransformerLens 4, which lacks a name that SAE-Lens imports first, was installed over it.
BROKEN = """
import sys
from pathlib import Path

(Path(sys.argv[1]) / "sae_lens").mkdir()
(Path(sys.argv[1]) / "sae_lens" / "__init__.py").write_text("from json import HookedNothing")
sys.path.insert(0, sys.argv[1])
"""
SAVE_AND_LOAD = """
import importlib
import tl_crosscoder as tlc
importlib.reload(importlib.reload(tlc))
import torch
from pathlib import Path

crosscoder = tlc.Crosscoder(4, 8, tlc.BatchTopK(2))
crosscoder.sparsity.threshold.fill_(0.5)
folder = tlc.save(crosscoder.eval(), Path(sys.argv[1]) / "cc")
assert sorted(path.name for path in (folder / "sae_lens").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
x = torch.randn(20, 2, 4)
for saved in (folder, folder / "sae_lens"):
    loaded = tlc.load(saved)
    assert torch.allclose(loaded.encode(x), crosscoder.encode(x), atol=1e-6), saved
    assert loaded.encode(x).any()
tlc.convert(loaded, "sae-lens", Path(sys.argv[1]) / "again")
"""
WANTING = """
from tl_crosscoder.hub.sae_lens.training import sae_lens_config, sae_lens_training
hook = "blocks.0.hook_resid_post"
for name, call in {
    "to_sae_lens": lambda: tlc.to_sae_lens(crosscoder, hook=hook),
    "paired": lambda: tlc.paired(crosscoder, 1, hook=hook),
    "as_sae": lambda: tlc.as_sae(crosscoder, 1, [x], encoder="copy", hook=hook),
    "joint": lambda: tlc.joint(None),
    "sae_lens_config": lambda: sae_lens_config(4, 8, 2),
    "sae_lens_training": lambda: sae_lens_training(None),
}.items():
    try:
        call()
    except ImportError as error:
        assert "pip install 'tl-crosscoder[sae-lens]'" in str(error), (name, error)
        assert sys.argv[2] in str(error), (name, error)
        print(name)
"""
NAMES = ["to_sae_lens", "paired", "as_sae", "joint", "sae_lens_config", "sae_lens_training"]


def refused(tmp_path, code, words):
    """The functions that raise ImportError with the remedy and with ``words``, in a fresh process."""
    command = [sys.executable, "-c", code, str(tmp_path), words]
    root = Path(tl_crosscoder.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_without_sae_lens_a_crosscoder_is_saved_and_loaded_and_the_rest_names_the_extra(tmp_path):
    """Also where it really is not installed, beside TransformerLens 4."""
    hidden = HIDDEN if find_spec("sae_lens") else "import sys\n"
    code = hidden + SAVE_AND_LOAD + WANTING + "assert 'sae_lens' not in sys.modules"
    assert refused(tmp_path, code, "which is not installed") == NAMES


def test_where_sae_lens_cannot_be_imported_the_reason_stands_beside_the_remedy(tmp_path):
    assert refused(tmp_path, BROKEN + SAVE_AND_LOAD + WANTING, "HookedNothing") == NAMES


@pytest.mark.skipif(find_spec("sae_lens") is None, reason="needs SAE-Lens")
@pytest.mark.filterwarnings("ignore")
def test_importing_again_registers_again_and_raises_nothing():
    import importlib

    from tl_crosscoder.hub.sae_lens.native import training_sae

    importlib.reload(importlib.reload(training_sae))
    from sae_lens.registry import get_sae_training_class

    kind, config = get_sae_training_class("tl_crosscoder_batchtopk")
    assert kind is training_sae.CrosscoderTrainingSAE
    assert kind(config(d_in=8, d_sae=4, k=1.0)).cfg.n_models == 2
