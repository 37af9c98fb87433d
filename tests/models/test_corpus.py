import itertools
import json

import pytest
import torch
from fake_pair import ASSISTANT, BOS, END, SYSTEM, TEMPLATE, USER, FakePair, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_crosscoder.errors import CorruptFile, EmptyData
from tl_crosscoder.models.answers import own_answers
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.text_source import load_text_source

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo!"}]
CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + TEMPLATE
GENERATION = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
)
# The reasoning before </think> is left out of all but the last message, as some reasoning models' templates do.
REASONING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% elif '</think>' in m['content'] %}{{ '<think>' + m['content'] }}"
    "{% else %}{{ '<think></think>' + m['content'] }}{% endif %}<|end|>{% endfor %}"
)


def read(corpus, sequence, tokenizer, flag):
    """The text of the tokens that have a flag, and of those that have not."""
    ids, marked = corpus.ids_of(sequence), corpus.flags_of(sequence)[flag]
    return tokenizer.decode(ids[marked].tolist()), tokenizer.decode(ids[~marked].tolist())


def test_the_flags_of_a_chat_are_what_one_would_write_by_hand(tiny_tokenizer):
    corpus = Corpus.from_chats([CHAT], tiny_tokenizer)
    ids = corpus.ids_of(0).tolist()
    #      bos  <|user|>  H      i      <|end|> <|assistant|>  Y  o  !        <|end|>
    assert [ids[0], ids[1], ids[4], ids[5], ids[9]] == [BOS, USER, END, ASSISTANT, END] and len(ids) == 10
    flags = {name: bits.int().tolist() for name, bits in corpus.flags_of(0).items()}
    assert flags["special"] == [1, 1, 0, 0, 1, 1, 0, 0, 0, 1]
    assert flags["template"] == [1, 1, 0, 0, 1, 1, 0, 0, 0, 1]
    assert flags["assistant"] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert flags["preamble"] == [0] * 10


def test_a_mapping_with_messages_is_the_same_chat(tiny_tokenizer):
    assert (
        Corpus.from_chats([{"messages": CHAT}], tiny_tokenizer).sha256
        == Corpus.from_chats([CHAT], tiny_tokenizer).sha256
    )


@pytest.mark.parametrize("template", [TEMPLATE, WITH_BOS])
def test_bos_stands_first_exactly_once(template):
    ids = Corpus.from_chats([CHAT], byte_tokenizer(template)).ids_of(0).tolist()
    assert ids[0] == BOS and ids.count(BOS) == 1


def test_content_is_found_though_it_repeats_the_template_and_is_trimmed():
    tokenizer = byte_tokenizer(CHATML)
    chat = [{"role": "user", "content": " user\n"}, {"role": "assistant", "content": "assistant"}]
    corpus = Corpus.from_chats([chat], tokenizer)
    said = read(corpus, 0, tokenizer, "template")
    assert said[1] == "userassistant"
    assert said[0] == "<|bos|><|user|>user\n<|end|>\n<|user|>assistant\n<|end|>\n"
    assert read(corpus, 0, tokenizer, "assistant")[0] == "assistant<|end|>"


def test_reasoning_that_the_template_rewrites_is_content_where_it_stays():
    tokenizer = byte_tokenizer(REASONING)
    chat = [*CHAT[:1], {"role": "assistant", "content": "hm</think>A"}]
    corpus = Corpus.from_chats([[*chat, *chat]], tokenizer)
    assert read(corpus, 0, tokenizer, "assistant")[0] == "A<|end|>hm</think>A<|end|>"
    assert read(corpus, 0, tokenizer, "template")[1] == "HiAHihm</think>A"


def test_generation_blocks_of_the_template_decide_what_the_assistant_said():
    tokenizer = byte_tokenizer(GENERATION)
    # This template ends its generation block before the end of the turn.
    assert read(Corpus.from_chats([CHAT], tokenizer), 0, tokenizer, "assistant")[0] == "Yo!"


def test_a_shared_system_prompt_is_the_preamble_and_shared_words_are_not(tiny_tokenizer):
    system = {"role": "system", "content": "Be kind."}
    chats = [[system, {"role": "user", "content": text}, CHAT[1]] for text in ("What is it?", "What was it?")]
    corpus = Corpus.from_chats(chats, tiny_tokenizer)
    for sequence in range(2):
        assert read(corpus, sequence, tiny_tokenizer, "preamble")[0] == "<|system|>Be kind.<|end|><|user|>"
    assert read(Corpus.from_chats(chats[:1], tiny_tokenizer), 0, tiny_tokenizer, "preamble")[0] == ""


def test_special_tokens_typed_into_a_message_are_special_and_not_template(tiny_tokenizer):
    flags = Corpus.from_chats([[{"role": "user", "content": "a<|system|>b"}]], tiny_tokenizer)
    at = flags.ids_of(0).tolist().index(SYSTEM)
    assert flags.flags_of(0)["special"][at] and not flags.flags_of(0)["template"][at]


def test_prompts_end_where_the_answer_begins(tiny_tokenizer):
    corpus = Corpus.prompts(["Hi", CHAT[:1]], tiny_tokenizer)
    assert tiny_tokenizer.decode(corpus.ids_of(0).tolist()) == "<|bos|><|user|>Hi<|end|><|assistant|>"
    assert torch.equal(corpus.ids_of(0), corpus.ids_of(1))


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no chat template.*tokenizer\.chat_template ="):
        Corpus.from_chats([CHAT], byte_tokenizer(None))


def test_a_chat_that_is_no_chat_is_named_by_its_number(tiny_tokenizer):
    with pytest.raises(ValueError, match="chat 1 has the message"):
        Corpus.from_chats([CHAT, [{"role": "user"}]], tiny_tokenizer)
    with pytest.raises(ValueError, match="chat 0 is 'Hi'"):
        Corpus.from_chats(["Hi"], tiny_tokenizer)


def test_windows_hold_every_token_of_the_documents_in_order(tiny_tokenizer):
    texts = ["abc" * 7, "", "d" * 30, "e"]
    corpus = Corpus.from_texts(texts, tiny_tokenizer, context=16)
    # 21 + 30 + 1 tokens in windows of BOS and 15: 15, 15, 15, 7
    assert corpus.lengths.tolist() == [16, 16, 16, 8]
    ids = [corpus.ids_of(n).tolist() for n in range(4)]
    assert {row[0] for row in ids} == {BOS}
    assert tiny_tokenizer.decode([i for row in ids for i in row[1:]]) == "".join(texts)


def test_a_document_that_starts_with_bos_does_not_double_it(tiny_tokenizer):
    for windows in (True, False):
        corpus = Corpus.from_texts(["<|bos|>abc"], tiny_tokenizer, windows=windows)
        assert tiny_tokenizer.decode(corpus.ids_of(0).tolist()) == "<|bos|>abc"


def test_without_windows_each_document_is_one_sequence(tiny_tokenizer):
    corpus = Corpus.from_texts(["abc", "d" * 30], tiny_tokenizer, context=8, windows=False)
    assert corpus.lengths.tolist() == [4, 8]


def test_a_tokenizer_without_bos_gets_none(tiny_tokenizer):
    tiny_tokenizer.bos_token = None
    assert tiny_tokenizer.decode(Corpus.from_texts(["abc"], tiny_tokenizer).ids_of(0).tolist()) == "abc"


def test_no_tokens_are_an_error(tiny_tokenizer):
    with pytest.raises(EmptyData):
        Corpus.from_texts(["", ""], tiny_tokenizer)
    with pytest.raises(EmptyData):
        Corpus.from_chats([], tiny_tokenizer)
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        Corpus.from_texts("one document", tiny_tokenizer)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40))
def test_length_sorted_batches_hold_every_sequence_once_within_the_limit(lengths, max_tokens):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.arange(int(offsets[-1]))
    corpus = Corpus(ids, offsets, torch.zeros_like(ids), ["x"] * len(lengths))
    seen, widths = [], []
    for indices, batch in corpus.batches(max_tokens):
        assert len(batch) == 1 or batch.ids.numel() <= max_tokens
        for row, sequence in enumerate(indices.tolist()):
            assert torch.equal(batch.ids[row][batch.attention_mask[row]], corpus.ids_of(sequence).long())
        seen += indices.tolist()
        widths.append(batch.ids.shape[1])
    assert sorted(seen) == list(range(len(lengths)))
    assert widths == sorted(widths, reverse=True)


def test_a_batch_carries_the_flags_to_either_side(tiny_tokenizer):
    corpus = Corpus.from_chats([CHAT, [{"role": "user", "content": "Longer than that."}]], tiny_tokenizer)
    right, left = corpus.batch([0, 1]), corpus.batch([0, 1], pad="left")
    assert not right.attention_mask[0, -1] and not left.attention_mask[0, 0]
    for name in ("ids", "special", "template", "assistant", "attention_mask"):
        assert torch.equal(getattr(right.padded("left"), name), getattr(left, name)), name
    assert torch.equal(Corpus.from_batch(left).ids, corpus.ids)
    assert torch.equal(Corpus.from_batch(left).flags, corpus.flags)


def test_adding_corpora_keeps_sequences_and_sources(tiny_tokenizer):
    texts, chats = Corpus.from_texts(["abc"], tiny_tokenizer), Corpus.from_chats([CHAT], tiny_tokenizer)
    both = texts + chats
    assert both.sources == ("text", "chats") and both.n_tokens == texts.n_tokens + chats.n_tokens
    assert torch.equal(both.ids_of(1), chats.ids_of(0))
    assert torch.equal(both.flags_of(1)["assistant"], chats.flags_of(0)["assistant"])


def test_a_split_shares_no_sequence_and_its_seed_decides_it(corpus):
    left, right = corpus.split(0.7, seed=3)
    assert len(left) == round(0.7 * len(corpus)) and len(left) + len(right) == len(corpus)
    rows = [tuple(part.ids_of(n).tolist()) for part in (left, right) for n in range(len(part))]
    assert sorted(rows) == sorted(tuple(corpus.ids_of(n).tolist()) for n in range(len(corpus)))
    assert corpus.split(0.7, seed=3)[0].sha256 == left.sha256 != corpus.split(0.7, seed=4)[0].sha256
    with pytest.raises(EmptyData):
        corpus.split(1.0)


def test_answers_to_one_prompt_are_one_conversation_and_equal_texts_are_another(tiny_tokenizer):
    def chat(question, *answers):
        turns = [{"role": "assistant", "content": answer} for answer in answers]
        return [{"role": "user", "content": question}, *turns]

    asked = [chat("A?", "x"), chat("B?", "x"), chat("A?", "y", "z"), chat("B?", "x"), chat("A?")]
    texts = Corpus.from_texts(["abc", "abd", "abc"], tiny_tokenizer, windows=False)
    corpus = Corpus.from_chats(asked, tiny_tokenizer) + texts
    # The last chat has no answer, and so other ids than what stands before an answer: the role header.
    assert corpus.conversations().tolist() == [0, 1, 0, 1, 2, 3, 4, 3]
    answered = corpus.select([5, 2, 0])
    assert answered.conversations().tolist() == [0, 1, 1]


def test_a_sequence_that_opens_with_the_assistants_words_is_a_conversation_of_its_own():
    corpus = Corpus(torch.arange(4), torch.tensor([0, 2, 4]), torch.full((4,), 4), ["x", "x"])
    assert corpus.conversations().tolist() == [0, 1]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_a_split_keeps_conversations_whole_and_neither_side_empty(prompts, fraction, seed):
    # Each sequence is its prompt's id and, as the assistant's word, its own number.
    ids = torch.tensor([[prompt, 100 + n] for n, prompt in enumerate(prompts)]).flatten()
    offsets, flags = torch.arange(0, len(ids) + 1, 2), torch.tensor([0, 4] * len(prompts))
    corpus = Corpus(ids, offsets, flags, ["x"] * len(prompts))
    if len(set(prompts)) < 2:
        with pytest.raises(
            EmptyData, match=rf"the {len(prompts)} sequences are 1 conversation.*another prompt"
        ):
            corpus.split(fraction, seed)
        return
    left, right = corpus.split(fraction, seed)
    sides = [set(part.ids[::2].tolist()) for part in (left, right)]
    assert not sides[0] & sides[1] and len(left) + len(right) == len(prompts)
    largest = max(map(prompts.count, prompts))
    assert abs(len(left) - fraction * len(prompts)) <= largest


def test_taking_tokens_takes_whole_sequences(corpus):
    first = corpus.take(70)
    assert first.lengths.tolist() == corpus.lengths.tolist()[:2]  # 32 + 32, the third would make 96
    assert corpus.take(100, seed=1).n_tokens <= 100
    assert corpus.take(100, seed=1).sha256 != corpus.take(100, seed=2).sha256
    assert len(corpus.take(1)) == 1


flag_bytes = st.integers(0, 15)
sequences = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), flag_bytes), min_size=1, max_size=8), min_size=1, max_size=8
)


@settings(max_examples=25, deadline=None)
@given(sequences, st.text(max_size=5))
def test_save_then_load_is_the_same_corpus(tmp_path_factory, rows, source):
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    flat = torch.tensor([pair for row in rows for pair in row])
    names = [source if n % 2 else "other" for n in range(len(rows))]
    corpus = Corpus(flat[:, 0], offsets, flat[:, 1], names)
    path = tmp_path_factory.mktemp("corpus") / "corpus.safetensors"
    corpus.save(path)
    loaded = Corpus.load(path)
    assert loaded.sha256 == corpus.sha256 and loaded.sources == corpus.sources
    assert torch.equal(loaded.ids, corpus.ids) and torch.equal(loaded.flags, corpus.flags)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_a_corpus_with_offsets_out_of_place_is_refused(corpus, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "corpus.safetensors"
    corpus.save(path)
    tensors = load_file(path)
    save_file(tensors | {"offsets": tensors["offsets"].flip(0)}, path)
    with pytest.raises(CorruptFile, match="is no corpus"):
        Corpus.load(path)


def test_files_of_text_and_of_chats_are_read(tiny_tokenizer, tmp_path):
    (tmp_path / "prose.txt").write_text("One\ndocument.\n\n\nTwo.\n", encoding="utf-8")
    prose = Corpus.from_file(tmp_path / "prose.txt", tiny_tokenizer)
    assert tiny_tokenizer.decode(prose.ids_of(0).tolist()) == "<|bos|>One\ndocument.Two."
    rows = [{"messages": CHAT}, {"text": "plain"}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    mixed = load_text_source(tmp_path / "mixed.jsonl", tiny_tokenizer)
    assert mixed.sources == ("mixed", "mixed")
    assert torch.equal(mixed.ids_of(1), Corpus.from_chats([CHAT], tiny_tokenizer).ids_of(0))


def test_a_broken_line_of_a_file_is_named(tiny_tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        Corpus.from_file(tmp_path / "bad.jsonl", tiny_tokenizer)
    (tmp_path / "odd.jsonl").write_text('{"words": "fine"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 0: wanted one of messages.*it has words"):
        Corpus.from_file(tmp_path / "odd.jsonl", tiny_tokenizer)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_text_source(tmp_path / "absent.txt", tiny_tokenizer)
    with pytest.raises(ValueError, match=r"known are \.txt and \.jsonl"):
        Corpus.from_file(tmp_path / "table.csv", tiny_tokenizer)


def test_a_folder_of_rows_is_a_dataset(tiny_tokenizer, tmp_path):
    rows = [{"prose": f"Row {n}.", "text": "not this"} for n in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    corpus = Corpus.from_dataset(str(tmp_path), tiny_tokenizer, column="prose", limit=3)
    assert tiny_tokenizer.decode(corpus.ids_of(0).tolist()) == "<|bos|>Row 0.Row 1.Row 2."
    by_words = load_text_source(f"{tmp_path}:train:prose", tiny_tokenizer, limit=3)
    assert torch.equal(by_words.ids, corpus.ids)


def endless(rows, seen):
    """What ``load_dataset`` gives for a dataset that never ends."""

    def load_dataset(name, config=None, *, split, streaming):
        assert streaming
        seen.append((name, config, split))
        for number in itertools.count():
            seen.append(number)
            yield rows(number)

    return load_dataset


@pytest.mark.parametrize("max_tokens", [1, 500, 3000])
@pytest.mark.parametrize(
    "rows",
    [
        lambda n: {"text": f"Row {n} of many." * 2},
        lambda n: {"text": "" if n % 3 else f"Row {n}."},
        lambda n: {"messages": [*CHAT[:1], {"role": "assistant", "content": f"{n}." * 9}]},
    ],
)
def test_a_dataset_without_end_is_read_as_far_as_the_tokens_go(tiny_tokenizer, monkeypatch, rows, max_tokens):
    seen = []
    monkeypatch.setattr("datasets.load_dataset", endless(rows, seen))
    corpus = load_text_source("some/set@small:test", tiny_tokenizer, max_tokens=max_tokens)
    assert seen[0] == ("some/set", "small", "test") and set(corpus.sources) == {"some/set@small:test"}
    longest = int(corpus.lengths.max())
    assert max_tokens - 128 < corpus.n_tokens <= max(max_tokens, longest)
    # Whatever was read beyond that would not have changed what was taken.
    known = Corpus.from_dataset("some/set", tiny_tokenizer, limit=4 * len(seen)).take(max_tokens)
    assert torch.equal(corpus.ids, known.ids) and torch.equal(corpus.flags, known.flags)
    assert len(known) == len(corpus)


def test_a_dataset_is_named_by_its_split_column_and_configuration(tiny_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "at@home").mkdir()
    (tmp_path / "at@home" / "train.jsonl").write_text('{"text": "Row."}\n{"text": "Two."}', encoding="utf-8")
    assert load_text_source(tmp_path / "at@home", tiny_tokenizer).sources == ("at@home:train",)
    seen = []
    monkeypatch.setattr("datasets.load_dataset", endless(lambda _: {"words": "abc"}, seen))
    corpus = load_text_source("some/set::words", tiny_tokenizer, max_tokens=20)
    assert seen[0] == ("some/set", None, "train") and corpus.sources[0] == "some/set:train:words"
    with pytest.raises(ValueError, match=r"row 0: wanted the column 'word'.*it has words"):
        load_text_source("some/set::word", tiny_tokenizer, max_tokens=20)


def test_the_first_tokens_of_a_file_are_those_of_the_whole_file(tiny_tokenizer, tmp_path):
    (tmp_path / "prose.txt").write_text("Words. " * 100, encoding="utf-8")
    whole = load_text_source(tmp_path / "prose.txt", tiny_tokenizer)
    few = load_text_source(tmp_path / "prose.txt", tiny_tokenizer, max_tokens=300)
    assert torch.equal(few.ids, whole.take(300).ids) and len(few) == 2


def test_own_answers_are_the_generated_ids_up_to_the_end_of_turn(pair, tiny_tokenizer):
    prompts = Corpus.prompts(["Hi", "What?"], tiny_tokenizer)
    answers = own_answers(pair, prompts, max_new_tokens=5)
    assert answers.sources == ("answers_base",) * 2 + ("answers_tuned",) * 2
    asked = prompts.ids_of(0).tolist()
    # Longest prompt first: "What?" is row 0 of the batch and "Hi" row 1.
    assert answers.ids_of(0).tolist() == [*asked, 70, 71, END]
    assert answers.ids_of(2).tolist() == [*asked, 81, 82, 83]
    assert answers.ids_of(3).tolist()[-2:] == [80, END]
    flags = {name: bits.int().tolist()[-3:] for name, bits in answers.flags_of(0).items()}
    assert flags == {
        "special": [0, 0, 1],
        "template": [0, 0, 1],
        "assistant": [1, 1, 1],
        "preamble": [0, 0, 0],
    }
    assert not answers.flags_of(0)["assistant"][: len(asked)].any()
    assert pair.base.seen[0].attention_mask[:, -1].all(), "prompts are padded on the left for generation"
    assert END in pair.base.seeds[0][2]


def test_answers_know_the_end_of_turn_that_only_the_template_has():
    # Here a turn ends with <|system|>, which is not the tokenizer's end token.
    tokenizer = byte_tokenizer(TEMPLATE.replace("<|end|>", "<|system|>"))
    pair = FakePair(tokenizer)
    own_answers(pair, ["Hi"])
    assert pair.tuned.seeds[0][2] == {END, SYSTEM}
