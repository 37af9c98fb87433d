"""The README's snippet runs as it stands, with a tiny pair and small sizes in place of the large ones."""

import re
import warnings
from pathlib import Path

import pytest
import torch

import tl_crosscoder as tlc
from tests.models.fake_pair import byte_tokenizer
from tests.models.tiny_models import bridged, tiny_llama_model

README = Path(tlc.__file__).parent.parent / "README.md"
SMALL = {
    "blocks.13.hook_resid_post": "blocks.1.hook_resid_post",
    "d_in=2304": "d_in=16",
    "d_sae=36_864": "d_sae=48",
    "BatchTopK(k=100)": "BatchTopK(k=4)",
    "batch_size=4096": "batch_size=64",
    "steps=50_000": "steps=30, progress=False",
    '"acts/"': 'folder / "acts"',
    '"crosscoder/"': 'folder / "crosscoder"',
}


def snippet() -> str:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for large, small in SMALL.items():
        assert large in code, f"the README no longer says {large}"
        code = code.replace(large, small)
    return code


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_readme_snippet_runs_and_its_edit_changes_the_logits(tmp_path):
    tokenizer = byte_tokenizer()
    base, tuned = (bridged(tiny_llama_model(seed, vocab=len(tokenizer))) for seed in (0, 1))
    tokens = tlc.Corpus.from_texts([f"text {i} " * 9 for i in range(40)], tokenizer, context=32)
    batch = tokens.batch([0, 1])
    known = {"base": base, "tuned": tuned, "tokens": tokens, "batch": batch, "folder": tmp_path}
    with warnings.catch_warnings():
        exec(compile(snippet(), str(README), "exec"), known)
    assert len(known["table"]) == 48
    assert known["latents"].shape == (*batch.ids.shape, 48)
    plain = tuned(batch.ids)
    assert (known["logits"] - plain).abs().max() > 1e-4
    torch.testing.assert_close(tuned(batch.ids), plain)  # the hook is gone after the block
    loaded = tlc.load(tmp_path / "crosscoder")
    x = next(known["held_out"].batches(8))
    assert torch.equal(loaded.encode(x), known["cc"].encode(x))
