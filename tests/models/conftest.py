"""A byte-level tokenizer with a chat template, made in memory: 256 bytes and five special tokens."""

import pytest
from fake_pair import FakePair, byte_tokenizer

from tl_crosscoder.models.corpus import Corpus


@pytest.fixture
def tiny_tokenizer():
    return byte_tokenizer()


@pytest.fixture
def pair(tiny_tokenizer):
    return FakePair(tiny_tokenizer)


@pytest.fixture
def corpus(tiny_tokenizer):
    """Ten windows of text and three chats, of many lengths: 379 tokens."""
    texts = [f"Text {n} says {'nothing much ' * n}again." for n in range(6)]
    chats = [
        [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "So." * n}]
        for n in range(1, 4)
    ]
    return Corpus.from_texts(texts, tiny_tokenizer, context=32) + Corpus.from_chats(chats, tiny_tokenizer)
