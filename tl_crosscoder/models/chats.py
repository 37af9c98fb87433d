"""Chats to token ids, knowing of each token whether a message said it or the template wrote it, and for whom.

Each chat is rendered twice, with its own words and with a placeholder in place of each message.  What stands
between the placeholders is the template's; the rest is content, also where the template trims it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tl_crosscoder.models.tokenizer import special_ids

SPECIAL, TEMPLATE, ASSISTANT, PREAMBLE = 1, 2, 4, 8

#: ``{% generation %}`` marks the assistant's words in some templates.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PLACEHOLDER = re.compile(r"«message·(\d+)»")

Chat = Sequence[Mapping[str, Any]]
Marked = tuple[np.ndarray, np.ndarray]


def as_messages(chats: Iterable[Any]) -> list[list[dict[str, str]]]:
    """Lists of ``{"role", "content"}``; a chat may also be a mapping with the key ``messages``."""
    checked = []
    for number, chat in enumerate(chats):
        messages = chat.get("messages") if isinstance(chat, Mapping) else chat
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ValueError(
                f'chat {number} is {chat!r:.80}; wanted a list of {{"role", "content"}} messages.'
            )
        for message in messages:
            said = message.get("content") if isinstance(message, Mapping) else None
            if not isinstance(said, str) or not isinstance(message.get("role"), str):
                raise ValueError(
                    f"chat {number} has the message {message!r:.80}; wanted a role and a content, both text."
                )
        checked.append([{"role": m["role"], "content": m["content"]} for m in messages])
    return checked


def tokenise_chats(
    chats: Sequence[Chat], tokenizer: Any, add_generation_prompt: bool = False
) -> list[Marked]:
    """Ids and flag bits of each chat, BOS first if the tokenizer has one and never twice."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so chats cannot become tokens; "
            "copy the fine-tuned model's: tokenizer.chat_template = tuned_tokenizer.chat_template."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} gives no offsets; load a fast one with AutoTokenizer."
        )
    if not chats:
        return []
    skeletons = [
        [{**message, "content": f"«message·{i}»"} for i, message in enumerate(chat)] for chat in chats
    ]
    options = {"add_generation_prompt": add_generation_prompt}
    texts = tokenizer.apply_chat_template(list(chats), tokenize=False, **options)
    outlines = tokenizer.apply_chat_template(skeletons, tokenize=False, **options)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spoken = _generation_masks(chats, tokenizer, options)
    special = np.array(sorted(special_ids(tokenizer)))
    marked = []
    for n, (chat, text, outline) in enumerate(zip(chats, texts, outlines, strict=True)):
        ids, offsets = (
            np.array(encoded["input_ids"][n]),
            np.array(encoded["offset_mapping"][n]).reshape(-1, 2),
        )
        said = content_spans(text, outline, [message["content"] for message in chat])
        own = [said[i] for i, message in enumerate(chat) if message["role"] == "assistant" and i in said]
        is_special = np.isin(ids, special)
        content = _covered(offsets, said.values(), len(text))
        assistant = _covered(offsets, own, len(text)) if spoken is None else np.array(spoken[n], dtype=bool)
        if spoken is None:  # the end of an assistant's turn is the assistant's: it decided to stop there
            assistant[1:] |= assistant[:-1] & is_special[1:]
        flags = is_special * SPECIAL + ~content * TEMPLATE + assistant * ASSISTANT
        marked.append(with_bos(ids, flags, tokenizer.bos_token_id, SPECIAL | TEMPLATE))
    return mark_preamble(marked)


def content_spans(text: str, outline: str, contents: Sequence[str]) -> dict[int, tuple[int, int]]:
    """Message number -> the characters of ``text`` that are its content, given the chat with placeholders.

    A message that the template leaves out has no span.  Raises ValueError where the template writes something
    else around the words than around the placeholders.
    """
    literals = PLACEHOLDER.split(outline)[::2]
    order = [int(number) for number in PLACEHOLDER.findall(outline)]
    cursor = _agreement(text, literals[0])
    spans = {}
    for number, after in zip(order, literals[1:], strict=True):
        for words in (contents[number], contents[number].strip()):
            stop = cursor + len(words)
            agreed = _agreement(text[stop:], after)
            if text.startswith(words, cursor) and (agreed or not after):
                break
        else:  # the template changed the words themselves, for example removed the reasoning
            stop = text.find(after, cursor) if after else len(text)
            agreed = len(after)
            if stop < 0:
                raise ValueError(
                    f"cannot find message {number}, {contents[number]!r:.60}, in the chat {text!r:.200}."
                )
        spans[number] = (cursor, stop)
        cursor = stop + agreed
    return spans


def mark_preamble(marked: list[Marked]) -> list[Marked]:
    """The chats with their common preamble flagged: what follows BOS and is the same in all of them.

    It ends with the template, before a message that differs, so chats that merely begin with the same word
    share no preamble beyond the role header.  It never reaches an assistant's words.
    """
    if len(marked) < 2:
        return marked
    shared = min(len(ids) for ids, _ in marked)
    reference, bits = marked[0]
    for ids, flags in marked:
        differs = (ids[:shared] != reference[:shared]) | (flags[:shared] & ASSISTANT > 0)
        shared = int(differs.argmax()) if differs.any() else shared
    template = np.flatnonzero(bits[:shared] & TEMPLATE)
    for _, flags in marked:
        flags[1 : template[-1] + 1 if len(template) else 0] |= PREAMBLE
    return marked


def with_bos(ids: np.ndarray, flags: np.ndarray, bos: int | None, bits: int) -> Marked:
    """The sequence starting with exactly one BOS, if there is such a token."""
    if bos is None or (len(ids) and ids[0] == bos):
        return ids, flags
    return np.concatenate([[bos], ids]), np.concatenate([[bits], flags])


def _generation_masks(
    chats: Sequence[Chat], tokenizer: Any, options: dict[str, Any]
) -> list[list[int]] | None:
    """What the template itself marks as the assistant's, or None where it marks nothing."""
    if not isinstance(tokenizer.chat_template, str) or not GENERATION.search(tokenizer.chat_template):
        return None
    encoded = tokenizer.apply_chat_template(
        list(chats), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return encoded["assistant_masks"]


def _covered(offsets: np.ndarray, spans: Iterable[tuple[int, int]], length: int) -> np.ndarray:
    """Which tokens overlap one of the character spans."""
    inside = np.zeros(length + 1, dtype=np.int64)
    for start, stop in spans:
        inside[start + 1 : stop + 1] = 1
    before = inside.cumsum()
    return before[offsets[:, 1]] > before[offsets[:, 0]]


def _agreement(text: str, literal: str) -> int:
    """How many first characters two texts share."""
    differing = (n for n, (ours, theirs) in enumerate(zip(text, literal, strict=False)) if ours != theirs)
    return next(differing, min(len(text), len(literal)))
