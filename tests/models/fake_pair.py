"""A pair of models made of two tables: each token's activations depend on it and on the mean of the tokens before it."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, END, USER, ASSISTANT, SYSTEM = range(5)
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE, further: int = 0) -> PreTrainedTokenizerFast:
    """Ids 0-4 are special, one byte a token after them; ``further`` tokens make it another tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet, *(f"further{n}" for n in range(further))]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=template,
    )


class FakeBackend:
    """Answers every prompt with ``script``, filled with the pad token to the longest answer."""

    model = None

    def __init__(self, script: list[list[int]]):
        self.script, self.seen, self.seeds = script, [], []

    def generate(self, batch, max_new_tokens, *, temperature=0.0, seed=0, stop_ids=None):
        self.seen.append(batch)
        self.seeds.append((temperature, seed, stop_ids))
        answers = [self.script[n % len(self.script)][:max_new_tokens] for n in range(len(batch))]
        width = max(map(len, answers))
        return torch.tensor([answer + [END] * (width - len(answer)) for answer in answers])


class FakePair:
    """``trouble``: token id -> what is added to its activations in the tuned model (a number, NaN or Inf)."""

    hook = "blocks.1.hook_resid_post"

    def __init__(self, tokenizer=None, *, d_in=4, weights="a", first_norm=100.0, trouble=None):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(300, 2, d_in, generator=generator)
        self.tokenizer, self.d_in, self.weights = tokenizer, d_in, weights
        self.first_norm, self.trouble, self.calls = first_norm, trouble or {}, 0
        self.base, self.tuned = FakeBackend([[70, 71, END]]), FakeBackend([[80, END], [81, 82, 83]])

    def capture(self, batch):
        self.calls += 1
        own = self.table[batch.ids] * batch.attention_mask[..., None, None]
        before = own.cumsum(1) / (batch.position_ids + 1)[..., None, None]
        acts = own / own.norm(dim=-1, keepdim=True).clamp(min=1e-9) + 0.1 * before
        acts = torch.where(batch.first[..., None, None], self.first_norm * acts, acts)
        for token, value in self.trouble.items():
            acts[..., 1, 0] += torch.where(batch.ids == token, value, 0.0)
        return acts

    def description(self):
        sides = {side: {"fingerprint": side + self.weights, "name": "fake"} for side in ("base", "tuned")}
        return {**sides, "hook": self.hook, "d_in": self.d_in}
