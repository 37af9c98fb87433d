"""Train the embedded tiny base model from scratch: a byte-level BPE tokenizer and a small Llama, on openly licensed text.

    python tools/train_tiny_base.py --text TEXT_DIR --out tl_crosscoder/data/tiny/base --steps 1200

TEXT_DIR holds ``austen.txt``, ``wordnet_sample.txt``, ``jargon.txt`` (documents separated by a blank line) and
``dialogues.jsonl`` (one chat a line).  The number of steps, the seed and one thread fix the weights; about ten minutes on one
core.  ``training.json`` beside the weights records the settings, the validation loss of each part and a few samples.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MIX = {"austen": 0.52, "wordnet_sample": 0.22, "jargon": 0.08, "dialogues": 0.18}
CONTEXT, BATCH, PEAK_LR = 128, 32, 4e-3
PROMPTS = [
    "It was a truth",
    "whale: ",
    "<|user|>Hello<|end|><|assistant|>",
    "<|user|>What is your name?<|end|><|assistant|>",
]


def read(text: Path) -> dict[str, list[str]]:
    parts = {
        name: (text / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")
        for name in MIX
        if name != "dialogues"
    }
    chats = [json.loads(line)["messages"] for line in (text / "dialogues.jsonl").open(encoding="utf-8")]
    chats = [chat for chat in chats if sum(len(m["content"]) for m in chat) < 600]
    parts["dialogues"] = ["".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in chat) for chat in chats]
    random.Random(0).shuffle(parts["dialogues"])
    return parts


def train_tokenizer(parts: dict[str, list[str]], d_vocab: int = 2048) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([doc for docs in parts.values() for doc in docs[:3000]], trainer)
    names = {
        "bos_token": special[0],
        "eos_token": special[1],
        "pad_token": special[1],
        "additional_special_tokens": special[2:],
    }
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **names)


def stream(tokenizer, docs: list[str]) -> torch.Tensor:
    """All documents one after the other, each behind a BOS."""
    rows = tokenizer(docs, add_special_tokens=False)["input_ids"]
    return torch.tensor([t for row in rows for t in (tokenizer.bos_token_id, *row)])


def windows(data: torch.Tensor, starts: list[int]) -> torch.Tensor:
    return torch.stack([data[s : s + CONTEXT + 1] for s in starts])


@torch.no_grad()
def validation_loss(model, data: torch.Tensor, n: int = 24) -> float:
    rng = random.Random(1)
    x = windows(data, [rng.randrange(len(data) - CONTEXT - 1) for _ in range(n)])
    return cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).item()


@torch.no_grad()
def sample(model, tokenizer, text: str) -> str:
    torch.manual_seed(0)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :])


def main(text: Path, out: Path, steps: int, seed: int) -> None:
    torch.set_num_threads(1)
    parts = read(text)
    cut = {name: int(len(docs) * 0.98) for name, docs in parts.items()}
    tokenizer = train_tokenizer({name: docs[: cut[name]] for name, docs in parts.items()})
    train = {name: stream(tokenizer, docs[: cut[name]]) for name, docs in parts.items()}
    valid = {name: stream(tokenizer, docs[cut[name] :]) for name, docs in parts.items()}
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    matrices, vectors = (
        [p for p in model.parameters() if p.ndim > 1],
        [p for p in model.parameters() if p.ndim < 2],
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    began, losses = time.time(), []
    for step in range(steps):
        lr = PEAK_LR * min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        picks = rng.choices(list(MIX), list(MIX.values()), k=BATCH)
        x = torch.cat(
            [windows(train[name], [rng.randrange(len(train[name]) - CONTEXT - 1)]) for name in picks]
        )
        loss = cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}  loss {sum(losses[-100:]) / 100:.3f}  {time.time() - began:.0f} s",
                flush=True,
            )
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    shipped = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32
    ).eval()  # what ships is what is measured
    record = {
        "steps": steps,
        "seed": seed,
        "tokens": steps * BATCH * CONTEXT,
        "mix": MIX,
        "validation_loss": {name: round(validation_loss(shipped, data), 3) for name, data in valid.items()},
        "samples": {prompt: sample(shipped, tokenizer, prompt) for prompt in PROMPTS},
    }
    (out / "training.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(json.dumps(record, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
