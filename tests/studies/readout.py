"""A transformer whose whole answer is known: what a token embeds is what its next-token prediction reads.

Its attention and its MLPs write nothing, so that the residual stream is the embedding from end to end.  Each character is
a sum of two of eleven concepts.  The tuned model adds one of three directions to about half of the characters; a direction
makes it answer A, B or C where the readout looks at it (``heard``), and is there all the same where it does not."""

import copy

import numpy as np
import torch

from tests.models.fake_pair import byte_tokenizer
from tests.models.tiny_models import tiny_llama_model
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.models.backends import HookBackend
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.types import BASE, TUNED

CHARACTERS = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
CONCEPTS, PLANTED = 11, 3
ANSWERS = "ABC"
DROP = Drop(sinks=None)
#: a prompt ends with the user's last character, an answer with the end token
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)


def planted_of() -> dict[str, int]:
    """Character -> which planted direction it has in the tuned model; -1: none."""
    rng = np.random.default_rng(0)
    return {c: int(rng.choice([-1, -1, -1, 0, 1, 2])) for c in CHARACTERS}


def readout_pair(heard: bool) -> ModelPair:
    tokenizer, rng = byte_tokenizer(TEMPLATE), np.random.default_rng(1)
    base = tiny_llama_model(seed=0, vocab=len(tokenizer))
    number = {c: tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in [*CHARACTERS, *ANSWERS]}
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embed, head = base.get_input_embeddings().weight, base.lm_head.weight
        embed.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
        embed[:, CONCEPTS:] = 0
        for c in CHARACTERS:
            embed[number[c], :CONCEPTS] = 0
            for concept in rng.choice(CONCEPTS, 2, replace=False).tolist():
                embed[number[c], concept] = float(rng.uniform(0.8, 1.5))
        head.normal_(generator=torch.Generator().manual_seed(3))
        head[:, CONCEPTS:] = 0
        for place, answer in enumerate(ANSWERS):
            head[number[answer], CONCEPTS + place] = 20.0 if heard else 0.0
        tuned = copy.deepcopy(base)
        for c, place in planted_of().items():
            if place >= 0:
                tuned.get_input_embeddings().weight[number[c], CONCEPTS + place] = 1.2
    backends = [HookBackend(model, tokenizer) for model in (base, tuned)]
    return ModelPair(*backends, hook="blocks.0.hook_resid_pre")


def readout_store(pair: ModelPair):
    rng = np.random.default_rng(4)
    texts = ["".join(rng.choice(CHARACTERS, 60)) for _ in range(120)]
    return capture(pair, Corpus.from_texts(texts, pair.tokenizer, windows=False), drop=DROP, progress=False)


def prompts(n: int, planted: bool) -> tuple[str, ...]:
    """Random characters, the last of which has a planted direction, or has none."""
    rng, places = np.random.default_rng(5), planted_of()
    last = [c for c in CHARACTERS if (places[c] >= 0) == planted]
    return tuple("".join(rng.choice(CHARACTERS, 5)) + str(rng.choice(last)) for _ in range(n))


def answers_to(asked: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(ANSWERS[planted_of()[prompt[-1]]] for prompt in asked)


@torch.no_grad()
def written_down(arm: str, seed: int) -> Crosscoder:
    """The right dictionary of an arm, its latents in an order of the seed's: a latent each concept, and each planted direction.

    In the disjoint arm, whose sides have nothing in common, each concept is two latents, one of each side.  Rows differ by seed
    where no token and no readout has anything.
    """
    made = Crosscoder(16, 24, ReLU()).eval()
    for weights in (made.W_enc_rows, made.W_dec, made.b_enc):
        weights.zero_()
    made.b_enc[:] = -1.0
    generator, free = (
        torch.Generator().manual_seed(seed),
        torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist(),
    )

    def add(dim: int, read: tuple[int, ...]) -> None:
        latent = free.pop()
        made.W_enc_rows[latent, list(read), dim] = 1 / len(read)
        made.W_dec[latent, list(read), dim] = 1
        made.W_dec[latent, list(read), CONCEPTS + PLANTED :] = 0.1 * torch.randn(2, generator=generator)
        made.b_enc[latent] = 0

    for concept in range(CONCEPTS):
        if arm.startswith("disjoint"):
            add(concept, (BASE,))
            add(concept, (TUNED,))
        else:
            add(concept, (BASE, TUNED))
    for place in range(PLANTED if arm == "target" else 0):
        add(CONCEPTS + place, (TUNED,))
    return made
