"""What capture must know of a tokenizer: its special tokens, and a fingerprint that tells it from another."""

import hashlib
import json
from typing import Any

# Accents, digits, runs of spaces, code, another script and an emoji: two tokenizers that agree here and in
# their vocabulary cut text in the same way.
PROBE = "The café's  3,141 rows:\n\tif x != 1e-5: return «наука» 🌋 end."


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens, those added for a chat template included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """Hash of the vocabulary, the special ids and the ids of a probe text; None without a tokenizer."""
    if tokenizer is None:
        return None
    parts = [
        sorted(tokenizer.get_vocab().items()),
        sorted(special_ids(tokenizer)),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        tokenizer(PROBE, add_special_tokens=False)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def template_sha256(tokenizer: Any) -> str | None:
    """Hash of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()
