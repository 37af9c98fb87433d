"""What ships in tl_crosscoder/data: the listed files and no others, small, portable, and doing what they claim."""

import hashlib
import json
import re
import zlib

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_crosscoder.data import data_path
from tl_crosscoder.data.planted import PlantedPair
from tl_crosscoder.data.planted_smollm2 import SMOLLM2
from tl_crosscoder.data.planted_tiny import TINY

ROOT = data_path("NOTICE.md").parent
SHIPPED = sorted(
    p for p in ROOT.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc", ".md"} and p.parent != ROOT
)
LISTED = {
    name: digest
    for digest, name in (line.split() for line in data_path("SHA256SUMS").read_text().splitlines())
}
#: A folder of some machine: /home/..., /root/..., C:\...
MACHINE = re.compile(rb"/(home|Users|root|tmp|mnt|work|opt)/|[A-Z]:\\\\")


def test_the_list_of_files_is_complete():
    assert sorted(LISTED) == [p.relative_to(ROOT).as_posix() for p in SHIPPED]


def test_every_file_has_the_listed_hash():
    found = {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in SHIPPED}
    assert found == LISTED


def test_the_embedded_pair_and_the_texts_compress_to_less_than_5_mb():
    files = [p for p in SHIPPED if p.relative_to(ROOT).parts[0] in {"tiny", "text"}]
    assert sum(len(zlib.compress(p.read_bytes())) for p in files) < 5_000_000


def test_no_file_names_a_folder_of_the_machine_it_was_made_on():
    made_here = [p for p in SHIPPED if "text" not in p.parts]
    assert not [p.name for p in made_here if MACHINE.search(p.read_bytes())]


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"no shipped data named 'tiny/bose'.*tiny/base"):
        data_path("tiny/bose")


def test_every_text_has_its_licence_in_the_notice():
    notice = data_path("NOTICE.md").read_text(encoding="utf-8")
    texts = sorted(data_path("text").iterdir())
    assert [p.name for p in texts] == ["dialogues.jsonl", "glosses.txt", "jargon.txt", "novels.txt"]
    assert all(f"`text/{p.name}`" in notice for p in texts)
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice
    assert "Copyright (c) 2017, Gunther Cox" in notice


def test_every_dialogue_alternates_user_and_assistant():
    lines = data_path("text/dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [[message["role"] for message in json.loads(line)["messages"]] for line in lines]
    assert len(chats) > 1500
    assert all(roles == ["user", "assistant"] * (len(roles) // 2) for roles in chats)


@pytest.mark.parametrize("pair", [TINY, *SMOLLM2.values()], ids=lambda pair: pair.name)
def test_adapters_hold_finite_bfloat16_weights_up_to_the_hook(pair: PlantedPair):
    last_block = int(pair.hook.split(".")[1])
    with safe_open(data_path(pair.adapter) / "adapter_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert max(int(name.split(".layers.")[1].split(".")[0]) for name in tensors) == last_block


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str]) -> list[str]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [
        tokenizer.bos_token + tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
        for c in chats
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids = model.generate(**batch, max_new_tokens=14, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny():
    folder = data_path("tiny/base")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = (
        PeftModel.from_pretrained(other, data_path(TINY.adapter))
        .merge_and_unload()
        .requires_grad_(True)
        .eval()
    )
    return base, tuned, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("behaviour", TINY.behaviours, ids=lambda behaviour: behaviour.name)
def test_the_tiny_fine_tune_shows_each_behaviour_on_held_out_prompts_and_its_base_never_does(tiny, behaviour):
    base, tuned, tokenizer = tiny
    assert behaviour.rate(answers(tuned, tokenizer, list(behaviour.heldout))) >= 0.95
    assert behaviour.rate(answers(base, tokenizer, list(behaviour.heldout))) == 0


def test_the_tiny_fine_tune_mostly_leaves_other_prompts_alone(tiny):
    _, tuned, tokenizer = tiny
    for behaviour in TINY.behaviours:
        prompts = [*behaviour.near, *TINY.ordinary_heldout]
        assert behaviour.rate(answers(tuned, tokenizer, prompts)) < 0.2


def test_the_tiny_chat_template_marks_what_the_assistant_says(tiny):
    tokenizer = tiny[2]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    marked = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Hello.<|end|>"
