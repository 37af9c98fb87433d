"""Take the shipped text samples out of a folder of the full texts.

    python tools/sample_text.py --text TEXT --out tl_crosscoder/data/text

TEXT holds ``austen.txt``, ``wordnet_sample.txt`` and ``jargon.txt`` (documents separated by a blank line) and
``dialogues.jsonl`` (one chat a line).  Prose keeps its order: four stretches of whole paragraphs, spread evenly.
Definitions and chats are drawn one by one.  The seed fixes every byte.
"""

import argparse
import random
from pathlib import Path

#: name of the sample, file it comes from, bytes to keep, stretches of consecutive documents (0: single documents)
SAMPLES = (
    ("novels.txt", "austen.txt", 420_000, 4),
    ("glosses.txt", "wordnet_sample.txt", 200_000, 0),
    ("jargon.txt", "jargon.txt", 120_000, 0),
    ("dialogues.jsonl", "dialogues.jsonl", 500_000, 0),
)


def fill(docs: list[str], budget: int) -> list[str]:
    """The documents from the front that fit in ``budget`` bytes."""
    out, used = [], 0
    for doc in docs:
        used += len(doc.encode()) + 2
        if used > budget:
            break
        out.append(doc)
    return out


def sample(docs: list[str], budget: int, stretches: int, seed: int) -> list[str]:
    if not stretches:
        return fill(random.Random(seed).sample(docs, len(docs)), budget)
    starts = [len(docs) * i // stretches for i in range(stretches)]
    return [doc for start in starts for doc in fill(docs[start:], budget // stretches)]


def main(text: Path, out: Path, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, source, budget, stretches in SAMPLES:
        separator = "\n" if name.endswith(".jsonl") else "\n\n"
        docs = (text / source).read_text(encoding="utf-8").strip().split(separator)
        kept = sample(docs, budget, stretches, seed)
        (out / name).write_text(separator.join(kept) + "\n", encoding="utf-8")
        print(f"{name}: {len(kept)} of {len(docs)} documents, {(out / name).stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
