"""capture: read a corpus with both models and keep what they made of it.  A killed capture goes on where it stopped.

Several processes may capture together: each takes every n-th of the shards that are missing, and the first writes the manifest.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_crosscoder.files import sha256, write_json
from tl_crosscoder.lock import alone_in
from tl_crosscoder.models.activations import PairedActivations, stored_corpus
from tl_crosscoder.models.answers import own_answers
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.entries import entries, finished, remove_entries, write_entry
from tl_crosscoder.models.harvest import DType, Harvest, OnNonFinite, Pair
from tl_crosscoder.models.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    plain,
    read_manifest,
    refuse_other_capture,
    shard_file,
)
from tl_crosscoder.models.shards import MemoryShard, in_shards, to_shard
from tl_crosscoder.models.tokenizer import template_sha256, tokenizer_sha256
from tl_crosscoder.models.tokens import Tokens, as_batch
from tl_crosscoder.ranks import ALONE, Axis, all_do, on_first

Prompts = Corpus | Sequence[Any]


def capture(
    pair: Pair,
    corpus: Corpus | Tokens,
    path: str | Path | None = None,
    *,
    dtype: DType = "float32",
    drop: Drop | None = None,
    max_tokens: int = 4096,
    shard_tokens: int = 65_536,
    prompts: Prompts | None = None,
    on_nonfinite: OnNonFinite = "error",
    progress: bool = True,
    ranks: Axis = ALONE,
) -> PairedActivations:
    """Both models' activations on every token that ``drop`` leaves, in a folder or, with ``path=None``, in memory.

    ``corpus`` may also be a batch, or integer ids [seq, pos].  ``prompts``: chats for both models to answer; each answer
    joins the corpus (sources ``answers_base`` and ``answers_tuned``) and goes through both models.  ``max_tokens`` bounds
    a batch with its padding, ``shard_tokens`` what is held in memory at once.  A capture that was interrupted, or whose
    shards were deleted, goes on at the first missing shard and, under the same library versions, ends with the same bytes.

    ``ranks``: the processes that call this together, each with the pair and the same arguments (under torchrun ``every`` of the
    shard that :func:`~tl_crosscoder.training.sharding.joined` gives).  They leave what one would, and any number may go on.

    Raises PairMismatch for a folder that was captured otherwise, InUse for one that another process is capturing into, and
    NonFiniteActs for NaN or Inf, unless ``on_nonfinite="skip"``, which drops up to 0.1 % of the tokens.
    """
    drop = Drop() if drop is None else drop
    if min(max_tokens, shard_tokens) < 1:
        raise ValueError(f"max_tokens={max_tokens}, shard_tokens={shard_tokens}; wanted 1 or more each.")
    corpus = corpus if isinstance(corpus, Corpus) else Corpus.from_batch(as_batch(corpus, pair.tokenizer))
    if prompts is not None and not isinstance(prompts, Corpus):
        prompts = Corpus.prompts(prompts, pair.tokenizer)
    folder = None if path is None else Path(path)
    asked = {
        "pair": plain(pair.description()),
        "tokenizer_sha256": tokenizer_sha256(pair.tokenizer),
        "chat_template_sha256": template_sha256(pair.tokenizer),
        "corpus_sha256": corpus.sha256,
        "prompts_sha256": None if prompts is None else prompts.sha256,
        "dtype": dtype,
        "drop": asdict(drop),
        "max_tokens": max_tokens,
        "shard_tokens": shard_tokens,
        "on_nonfinite": on_nonfinite,
    }
    reading = {"dtype": dtype, "max_tokens": max_tokens, "on_nonfinite": on_nonfinite}

    def begun() -> tuple[Harvest, dict[str, Any]]:
        """What begins a capture: the corpus with the answers, and how large the activations are."""
        whole = corpus if prompts is None else corpus + own_answers(pair, prompts)
        harvest = Harvest(pair, whole, drop, **reading)
        return harvest, _manifest(harvest, asked, len(in_shards(whole, shard_tokens)))

    if folder is None:
        if ranks.size > 1:
            raise ValueError(f"{ranks.size} processes capture together into a folder; pass path.")
        return _in_memory(*begun(), progress)
    earlier = _earlier(folder, asked)
    if earlier is not None and finished(folder, earlier):
        return PairedActivations.open(folder)
    with ExitStack() as held:
        made: list[tuple[Harvest, dict[str, Any]]] = []

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone_in(folder))
            for half_written in (
                *folder.glob("*.tmp"),
                *folder.glob(".tmp*"),
            ):  # .tmp*: what safetensors calls them
                half_written.unlink()
            if _earlier(folder, asked) is None:
                made.append(begun())
                _begin(folder, made[0][0].corpus, pair.tokenizer, made[0][1])

        on_first(ranks, begin)
        if made:
            harvest, manifest = made[0]
        else:
            manifest = read_manifest(folder)
            refuse_other_capture(folder, manifest["asked"], asked)
            harvest = Harvest(
                pair, stored_corpus(folder, manifest), drop, **reading, medians=manifest["medians"]
            )
        _write_missing(harvest, folder, manifest, progress, ranks)
    return PairedActivations.open(folder, verify=ranks.index == 0)


def _earlier(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a capture to go on with, or None."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    refuse_other_capture(folder, manifest["asked"], asked)
    return manifest


def _manifest(harvest: Harvest, asked: dict[str, Any], n_shards: int) -> dict[str, Any]:
    corpus, bos = harvest.corpus, getattr(harvest.pair.tokenizer, "bos_token_id", None)
    opening = corpus.ids[corpus.offsets[:-1]]
    return {
        "format": "tl_crosscoder activations",
        "format_version": FORMAT_VERSION,
        "library_version": version("tl-crosscoder"),
        "asked": asked,
        "pair": asked["pair"],
        "hook": harvest.pair.hook,
        "dtype": asked["dtype"],
        "drop": asked["drop"],
        "d_in": harvest.d_in,
        "n_models": harvest.n_models,
        "medians": list(harvest.medians),
        "bos": {"id": bos, "sequences_opened_by_it": 0 if bos is None else int((opening == bos).sum())},
        "corpus_sha256": corpus.sha256,
        "candidates": harvest.candidates,
        "n_shards": n_shards,
        "shards": [],
        "rows": 0,
        "dropped": {},
    }


def _begin(folder: Path, corpus: Corpus, tokenizer: Any, manifest: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    corpus.save(folder / "corpus.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / MANIFEST, manifest)


def _write_missing(
    harvest: Harvest, folder: Path, manifest: dict[str, Any], progress: bool, ranks: Axis
) -> None:
    parts = in_shards(harvest.corpus, manifest["asked"]["shard_tokens"])
    there: dict[int, dict[str, Any]] = {}
    all_do(ranks, lambda: there.update(entries(folder, manifest)))  # all have looked before anyone writes
    harvest.skipped = sum(entry["dropped"].get("nonfinite", 0) for entry in there.values())
    mine = [number for number in range(len(parts)) if number not in there][ranks.index :: ranks.size]

    def work() -> None:
        tokens = sum(int(harvest.corpus.lengths[parts[number]].sum()) for number in mine)
        with _bar(progress and ranks.index == 0, tokens) as advance:
            for number in mine:
                file = folder / shard_file(number)
                shard = _shard(harvest, parts[number], file.name, advance)
                shard.save(file)
                write_entry(folder, number, _entry(shard, parts[number], harvest.corpus, file))

    def finish() -> None:
        found = entries(folder, manifest)
        shards = [found[number] for number in range(len(parts))]
        dropped = sum((Counter(entry["dropped"]) for entry in shards), Counter())
        harvest.refuse_skipped(dropped["nonfinite"])
        rows = sum(entry["rows"] for entry in shards)
        write_json(folder / MANIFEST, manifest | {"shards": shards, "rows": rows, "dropped": dict(dropped)})
        remove_entries(folder, manifest)

    all_do(ranks, work)
    on_first(ranks, finish)


def _in_memory(harvest: Harvest, manifest: dict[str, Any], progress: bool) -> PairedActivations:
    parts = in_shards(harvest.corpus, manifest["asked"]["shard_tokens"])
    with _bar(progress, harvest.corpus.n_tokens) as advance:
        shards = [_shard(harvest, sequences, f"part {n}", advance) for n, sequences in enumerate(parts)]
    dropped = sum((shard.dropped for shard in shards), Counter())
    manifest |= {"rows": sum(len(shard) for shard in shards), "dropped": dict(dropped)}
    return PairedActivations(shards, manifest, harvest.corpus, harvest.pair.tokenizer)


def _shard(harvest: Harvest, sequences: Tensor, name: str, advance: Callable[[int], None]) -> MemoryShard:
    def parts() -> Iterator[Any]:
        for group in harvest.corpus.groups(sequences, harvest.max_tokens):
            yield harvest.batch(group, name)
            advance(int(harvest.corpus.lengths[group].sum()))

    return to_shard(parts(), harvest.count(sequences))


def _entry(shard: MemoryShard, sequences: Tensor, corpus: Corpus, file: Path) -> dict[str, Any]:
    return {
        "file": file.name,
        "sha256": sha256(file),
        "rows": len(shard),
        "sequences": len(sequences),
        "tokens": int(corpus.lengths[sequences].sum()),
        "dropped": dict(shard.dropped),
    }


@contextmanager
def _bar(shown: bool, tokens: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(disable=not shown, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("capturing", total=tokens)
        yield lambda done: bar.advance(task, done)
