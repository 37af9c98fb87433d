import numpy as np

from tests.models.fake_pair import byte_tokenizer
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.template_slots import TemplateSlots

# <bos><user>…<end><assistant>…<end><user>…: four slots an exchange, numbered anew in each
TOKENIZER = byte_tokenizer()


def slots_of(*said, prompt=False):
    chat = [{"role": role, "content": words} for role, words in said]
    corpus = (Corpus.prompts if prompt else Corpus.from_chats)([chat], TOKENIZER)
    return TemplateSlots.of(TOKENIZER).slots(corpus.marked(0)[1].astype(int)).tolist()


def test_an_exchange_has_the_slots_of_its_tokens_in_order():
    slots = TemplateSlots.of(TOKENIZER)
    assert slots.names == ("<|user|>", "<|end|>", "<|assistant|>", "<|end|>")
    assert (slots.header, slots.between, slots.end) == (1, 2, 1)


def test_slots_count_anew_in_every_exchange_and_bos_is_elsewhere():
    got = slots_of(("user", "ab"), ("assistant", "c"), ("user", "d"), ("assistant", "ef"))
    assert got == [0, 1, -1, -1, 2, 3, -1, 4, 1, -1, 2, 3, -1, -1, 4]


def test_a_prompt_ends_in_the_middle_of_an_exchange():
    assert slots_of(("user", "a"), prompt=True) == [0, 1, -1, 2, 3]


def test_what_a_system_message_needs_of_the_template_is_elsewhere():
    assert slots_of(("system", "s"), ("user", "a"), ("assistant", "b")) == [0, 1, -1, 0, 1, -1, 2, 3, -1, 4]


def test_text_has_no_slots():
    flags = np.zeros(4, dtype=int)
    assert (TemplateSlots.of(TOKENIZER).slots(flags) == -1).all()
