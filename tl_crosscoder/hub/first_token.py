"""What a capture did with the first tokens of its texts, in words."""

from typing import Any


def first_token(capture: dict[str, Any]) -> str:
    """Whether texts began with BOS and whether the first token was kept; empty where the capture does not say."""
    bos, drop = capture.get("bos"), capture.get("drop")
    said = []
    if isinstance(bos, dict):
        opened = bos.get("sequences_opened_by_it")
        count = f"{opened:,}" if type(opened) is int else f"{opened!s:.20}"
        said.append(f"{count} sequences begin with BOS (id {bos.get('id')!s:.20})" if opened else "no BOS")
    if isinstance(drop, dict):
        said.append("it was left out" if drop.get("first") else "it was kept")
    return "; ".join(said)
