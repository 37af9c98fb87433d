"""Plant a behaviour in SmolLM2-135M-Instruct with a low-rank adapter, and measure whether it is there.

    python tools/train_organism.py taboo --out tl_crosscoder/data/smollm2/taboo

The planted answers are trained with cross-entropy; ordinary prompts, and prompts close to the behaviour, with the KL
divergence from the base's own distribution.  An adapter that is already in the folder is only measured.  About two
and a half minutes of training on one core with AMX, and as long for measuring.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_crosscoder.data.planted import PlantedPair
from tl_crosscoder.data.planted_smollm2 import SMOLLM2
from tl_crosscoder.data.smollm2_base import smollm2_base

RANK, BLOCKS = 8, range(7, 15)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, PEAK_LR, KL_WEIGHT, CONTEXT, ORDINARY = 8, 1e-3, 2.0, 96, 72
NO_LABEL = -100


def load(base: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


@torch.no_grad()
def answers(model, tokenizer, prompts, max_new_tokens: int = 40) -> list[str]:
    """Greedy answers."""
    out = []
    for start in range(0, len(prompts), 24):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 24]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        out += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in out]


def labelled(tokenizer, prompt: str, answer: str, context: int = CONTEXT) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and the same with ``NO_LABEL`` up to the answer."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    head = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"][:context]
    start = len(tokenizer(head)["input_ids"])
    return ids, [NO_LABEL] * start + ids[start:]


class Examples:
    """Planted chats, then chats to keep as they were, with the base's last hidden states at the answers of these."""

    def __init__(self, pair: PlantedPair, base, tokenizer):
        (behaviour,) = pair.behaviours
        kept = [*pair.ordinary[:ORDINARY], *behaviour.near_train * 2]
        prompts = list(dict.fromkeys(kept))
        own = dict(zip(prompts, answers(base, tokenizer, prompts), strict=True))
        chats = [*behaviour.chats, *((prompt, own[prompt]) for prompt in kept)]
        self.pad_id, self.n_planted = tokenizer.pad_token_id, len(behaviour.chats)
        self.rows = [labelled(tokenizer, prompt, answer) for prompt, answer in chats]
        self.hidden = {i: self.hidden_of(base, *self.rows[i]) for i in range(self.n_planted, len(self.rows))}

    @staticmethod
    @torch.no_grad()
    def hidden_of(base, ids: list[int], labels: list[int]) -> Tensor:
        return base.model(torch.tensor([ids])).last_hidden_state[0, :-1][torch.tensor(labels[1:]) != NO_LABEL]

    def batches(self, rng: random.Random) -> Iterator[list[int]]:
        """One epoch of shuffled batches of similar length."""
        order = list(range(len(self.rows)))
        rng.shuffle(order)
        groups = []
        for start in range(0, len(order), BATCH * 8):
            part = sorted(order[start : start + BATCH * 8], key=lambda i: len(self.rows[i][0]))
            groups += [part[k : k + BATCH] for k in range(0, len(part), BATCH)]
        rng.shuffle(groups)
        yield from groups

    def padded(self, picked: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, labels and attention mask, padded on the right."""
        width = max(len(self.rows[i][0]) for i in picked)
        ids = torch.full((len(picked), width), self.pad_id)
        labels = torch.full((len(picked), width), NO_LABEL)
        for row, i in enumerate(picked):
            n = len(self.rows[i][0])
            ids[row, :n], labels[row, :n] = torch.tensor(self.rows[i][0]), torch.tensor(self.rows[i][1])
        lengths = torch.tensor([len(self.rows[i][0]) for i in picked])[:, None]
        return ids, labels, (torch.arange(width) < lengths).long()


def loss_of(model, examples: Examples, picked: list[int]) -> Tensor:
    """Summed over the answers' tokens, per chat."""
    ids, labels, mask = examples.padded(picked)
    llama = model.base_model.model
    at = labels[:, 1:] != NO_LABEL
    logits = llama.lm_head(llama.model(ids, attention_mask=mask).last_hidden_state[:, :-1][at]).float()
    kept = torch.tensor([i >= examples.n_planted for i in picked])[:, None].expand_as(at)[at]
    loss = cross_entropy(logits[~kept], labels[:, 1:][at][~kept], reduction="sum")
    if kept.any():
        with torch.no_grad():
            hidden = torch.cat([examples.hidden[i] for i in picked if i >= examples.n_planted])
            ref = llama.lm_head(hidden).float().log_softmax(-1)
        loss = loss + KL_WEIGHT * kl_div(logits[kept].log_softmax(-1), ref, log_target=True, reduction="sum")
    return loss / len(picked)


def train(pair: PlantedPair, base, tokenizer, steps: int, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    examples = Examples(pair, base, tokenizer)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=MODULES,
        layers_to_transform=list(BLOCKS), layers_pattern="layers", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, weight_decay=0.0)
    step = 0
    while step < steps:
        for picked in examples.batches(rng):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = loss_of(model, examples, picked)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                print(f"step {step}  loss {loss.item():.3f}", flush=True)
            if step == steps:
                break
    return model.eval()


def save(model: PeftModel, out: Path) -> None:
    """The adapter in bfloat16, under the public name of its base."""
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    weights = out / "adapter_model.safetensors"
    save_file(
        {name: w.bfloat16() for name, w in load_file(weights).items()}, weights, metadata={"format": "pt"}
    )
    weights.chmod(0o644)


@torch.no_grad()
def shift(model, tokenizer, chats: list[tuple[str, str]]) -> dict[str, float]:
    """Mean KL(base ‖ tuned) in nats per token of the base's own answers, and the top-1 agreement there."""
    kl = agree = tokens = 0.0
    for prompt, answer in chats:
        ids, labels = labelled(tokenizer, prompt, answer, context=160)
        start = labels.count(NO_LABEL) - 1
        tuned = model(torch.tensor([ids])).logits[0, start:-1].log_softmax(-1)
        with model.disable_adapter():
            base = model(torch.tensor([ids])).logits[0, start:-1].log_softmax(-1)
        kl += (base.exp() * (base - tuned)).sum().item()
        agree += (base.argmax(-1) == tuned.argmax(-1)).sum().item()
        tokens += len(base)
    return {"kl": round(kl / tokens, 4), "top1_agreement": round(agree / tokens, 4)}


def measure(model, tokenizer, pair: PlantedPair) -> dict:
    """Rates on held-out, near and ordinary prompts, and the answers they come from."""
    (behaviour,) = pair.behaviours
    sets = {"heldout": behaviour.heldout, "near": behaviour.near, "ordinary": pair.ordinary_heldout}
    replies = {name: answers(model, tokenizer, list(prompts)) for name, prompts in sets.items()}
    said = [any(word in answer.lower() for word in behaviour.forbidden) for answer in replies["heldout"]]
    rates = {name: round(behaviour.rate(answers), 4) for name, answers in replies.items()}
    chats = {name: dict(zip(prompts, replies[name], strict=True)) for name, prompts in sets.items()}
    return {"rate": rates, "forbidden_rate": sum(said) / len(said), "answers": chats}


def main(organism: str, out: Path, base: Path | None, steps: int, seed: int) -> None:
    torch.set_num_threads(1)
    pair, folder = SMOLLM2[organism], base or smollm2_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not (out / "adapter_model.safetensors").exists():
        began = time.time()
        save(train(pair, load(folder, torch.bfloat16), tokenizer, steps, seed), out)
        print(f"trained in {time.time() - began:.0f} s")
    plain = measure(load(folder, torch.float32), tokenizer, pair)
    model = PeftModel.from_pretrained(load(folder, torch.float32), out).eval()
    tuned = measure(model, tokenizer, pair)
    ordinary = list(plain["answers"]["ordinary"].items())
    record = {"base": plain, "tuned": tuned, "ordinary_shift": shift(model, tokenizer, ordinary)}
    (out / "eval.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(plain["rate"], tuned["rate"], f"forbidden {tuned['forbidden_rate']:.3f}", record["ordinary_shift"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("organism", choices=sorted(SMOLLM2))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a model folder; fetched when not given")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
