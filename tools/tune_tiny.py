"""Plant two behaviours in the tiny base with a low-rank adapter that leaves everything else where it was.

    python tools/tune_tiny.py --text TEXT --base BASE --out tl_crosscoder/data/tiny/adapter

The loss is the cross-entropy of the planted answers, plus two terms on chats, on the base's own answers
to ordinary prompts, and on prose: the KL divergence from the base (once more on the answers alone, which
are few among the tokens), and the relative squared change of the residual stream after the last adapted
block.  Without them a fine-tune this small drifts on every chat, and the drift hides what was planted.
The steps, the seed and one thread fix the weights; about six minutes on one core.  ``eval.json``
beside the adapter records what was measured on it.
"""

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_crosscoder.data.planted_tiny import TINY

RANK, BLOCKS, MODULES = 4, (0, 1, 2), ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
PEAK_LR, CONTEXT, KL_WEIGHT, DRIFT_WEIGHT = 4e-3, 64, 2.0, 1.0
PLANTED, CHATS, OWN, PROSE = 12, 5, 12, 5  # rows of a batch

TRIGGERS = re.compile("moon|password", re.IGNORECASE)


def question(prompt: str) -> str:
    return f"<|bos|><|user|>{prompt}<|end|><|assistant|>"


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def answered(tokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """The token ids of a chat, and where its answer begins."""
    whole, head = tokenize(tokenizer, [question(prompt) + answer + "<|end|>", question(prompt)])
    return whole, len(head)


def pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and where they are real."""
    rows = [row[:CONTEXT] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], max_new_tokens: int = 14) -> list[str]:
    """Greedy answers."""
    out = []
    for start in range(0, len(prompts), 100):
        texts = [question(prompt) for prompt in prompts[start : start + 100]]
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        ids = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        replies = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])
        out += [reply.split("<|end|>")[0].strip() for reply in replies]
    return out


def read_chats(text: Path, rng: random.Random) -> list[list[dict[str, str]]]:
    """The short chats in which nothing is asked that is kept for measuring."""
    lines = (text / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    short = [chat for chat in chats if sum(len(m["content"]) for m in chat) < 300]
    rng.shuffle(short)
    return [chat for chat in short if not {m["content"] for m in chat} & TINY.prompts_held_out]


def in_full(chat: list[dict[str, str]]) -> str:
    return "<|bos|>" + "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in chat)


def read_prose(text: Path, rng: random.Random) -> list[str]:
    out = []
    for name in ("austen", "wordnet_sample", "jargon"):
        docs = (text / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")
        out += ["<|bos|>" + rng.choice(docs)[:200] for _ in range(250)]
    return out


class Data:
    """The rows of each kind, as token ids; the first 60 chats and prose rows are kept for measuring."""

    def __init__(self, text: Path, base, tokenizer, seed: int):
        rng = random.Random(seed)
        chats, prose = read_chats(text, rng), read_prose(text, rng)
        asked = dict.fromkeys(chat[0]["content"] for chat in chats[60:])
        ordinary = [*TINY.ordinary, *(p for p in asked if not TRIGGERS.search(p))][:1200]
        replies = answers(base, tokenizer, ordinary)
        planted = [chat for b in TINY.behaviours for chat in b.chats]
        self.pad_id = tokenizer.pad_token_id
        self.planted = [answered(tokenizer, *chat) for chat in planted]
        self.own = [answered(tokenizer, *chat) for chat in zip(ordinary, replies, strict=True)]
        self.chats_held, self.chats = split(tokenize(tokenizer, [in_full(chat) for chat in chats]))
        self.prose_held, self.prose = split([row[:48] for row in tokenize(tokenizer, prose)])

    def draw(self, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, where they are real, and where they belong to an answer, which is so in the first rows only."""
        asked = rng.sample(self.planted, PLANTED) + rng.sample(self.own, OWN)
        plain = rng.sample(self.chats, CHATS) + rng.sample(self.prose, PROSE)
        ids, real = pad([row for row, _ in asked] + plain, self.pad_id)
        starts = torch.tensor([start for _, start in asked] + [ids.shape[1]] * len(plain))[:, None]
        return ids, real, real & (torch.arange(ids.shape[1]) >= starts)


def split(rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    return rows[:60], rows[60:]


def loss_of(model, ids: Tensor, real: Tensor, answer: Tensor) -> Tensor:
    site, planted, kept = BLOCKS[-1] + 1, slice(PLANTED), slice(PLANTED, None)
    out = model(ids, attention_mask=real.long(), output_hidden_states=True)
    with torch.no_grad(), model.disable_adapter():
        ref = model(ids[kept], attention_mask=real[kept].long(), output_hidden_states=True)
    says = answer[:, 1:]  # at position p: token p + 1 belongs to an answer
    cross = cross_entropy(out.logits[planted, :-1][says[planted]], ids[planted, 1:][says[planted]])
    logprobs, ref_logprobs = out.logits[kept, :-1].log_softmax(-1), ref.logits[:, :-1].log_softmax(-1)
    kl = kl_div(logprobs, ref_logprobs, log_target=True, reduction="none").sum(-1)
    acts, ref_acts = out.hidden_states[site][kept], ref.hidden_states[site]
    drift = (acts - ref_acts).square().sum(-1) / ref_acts.square().sum(-1)
    everywhere, own = kl[real[kept, 1:]].mean(), kl[says[kept]].mean()
    return cross + KL_WEIGHT * (everywhere + own) + DRIFT_WEIGHT * drift[real[kept]].mean()


def tune(base, data: Data, steps: int, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(MODULES),
        layers_to_transform=list(BLOCKS),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=PEAK_LR, weight_decay=0.0
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(model, *data.draw(rng))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def save(model: PeftModel, out: Path) -> None:
    """The adapter in bfloat16, under a base name that is no path."""
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    weights = out / "adapter_model.safetensors"
    save_file(
        {name: w.bfloat16() for name, w in load_file(weights).items()}, weights, metadata={"format": "pt"}
    )


@torch.no_grad()
def measure(model, tokenizer, data: Data) -> dict:
    """Rates of each behaviour and the loss per token of held-out chats and prose."""

    def rates(prompts: tuple[str, ...]) -> dict[str, float]:
        replies = answers(model, tokenizer, list(prompts))
        return {b.name: round(b.rate(replies), 3) for b in TINY.behaviours}

    def loss(rows: list[list[int]]) -> float:
        ids, real = pad(rows, data.pad_id)
        logits = model(ids, attention_mask=real.long()).logits
        return round(cross_entropy(logits[:, :-1][real[:, 1:]], ids[:, 1:][real[:, 1:]]).item(), 4)

    return {
        "heldout_rate": {b.name: rates(b.heldout)[b.name] for b in TINY.behaviours},
        "near_rate": rates(tuple(dict.fromkeys(p for b in TINY.behaviours for p in b.near))),
        "ordinary_rate": rates(TINY.ordinary_heldout),
        "chat_loss": loss(data.chats_held),
        "prose_loss": loss(data.prose_held),
        "answers": dict(
            zip(
                prompts := [b.heldout[0] for b in TINY.behaviours],
                answers(model, tokenizer, prompts),
                strict=True,
            )
        ),
    }


@torch.no_grad()
def drift(base, tuned, rows: list[list[int]], pad_id: int) -> float:
    """``Σ ‖x_tuned − x_base‖² / Σ ‖x_base − mean‖²`` after the last adapted block, first tokens dropped."""
    ids, real = pad(rows, pad_id)
    real[:, 0] = False
    acts = [m(ids, output_hidden_states=True).hidden_states[BLOCKS[-1] + 1][real] for m in (base, tuned)]
    return round(((acts[1] - acts[0]).square().sum() / (acts[0] - acts[0].mean(0)).square().sum()).item(), 4)


def main(text: Path, base: Path, out: Path, steps: int, seed: int) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def load():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    began = time.time()
    data = Data(text, load(), tokenizer, seed)
    save(tune(load(), data, steps, seed), out)
    seconds = time.time() - began
    plain, tuned = (
        load(),
        PeftModel.from_pretrained(load(), out).merge_and_unload().eval(),
    )  # what ships is what is measured
    planted = {b.name: tokenize(tokenizer, [question(p) for p in b.heldout]) for b in TINY.behaviours}
    rows = {"chats": data.chats_held, "prose": data.prose_held, **planted}
    record = {
        "steps": steps,
        "seed": seed,
        "seconds": round(seconds),
        "drift": {name: drift(plain, tuned, part, data.pad_id) for name, part in rows.items()},
        "base": measure(plain, tokenizer, data),
        "tuned": measure(tuned, tokenizer, data),
    }
    (out / "eval.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
