"""Harvest: sequences in, the activations of the tokens that stay out.  What capture and streaming share."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.errors import EmptyData, NonFiniteActs
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import KEPT, REASONS, Drop
from tl_crosscoder.models.tokens import TokenBatch

DType = Literal["float32", "bfloat16"]
OnNonFinite = Literal["error", "skip"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES = ("base", "tuned")
SAMPLE_TOKENS = 2048
SKIPPED_AT_MOST = 1e-3


@runtime_checkable
class Pair(Protocol):
    """What capturing needs of a :class:`ModelPair`."""

    @property
    def hook(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    def capture(self, batch: TokenBatch) -> Float[Tensor, "seq pos model d_in"]: ...
    def description(self) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class Harvested:
    """Activations that stay, on the pair's device, where each token stood, and how many were dropped for which reason."""

    x: Float[Tensor, "batch model d_in"]
    sequence: Int[Tensor, "batch"]
    position: Int[Tensor, "batch"]
    dropped: Counter[str]


class Harvest:
    """A pair reading a corpus under a drop policy.

    ``medians``: the median norm of each model over a fixed sample of the corpus, against which sinks are told.
    """

    def __init__(
        self,
        pair: Pair,
        corpus: Corpus,
        drop: Drop,
        *,
        dtype: DType = "float32",
        max_tokens: int = 4096,
        on_nonfinite: OnNonFinite = "error",
        medians: Sequence[float] | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}; known: {', '.join(DTYPES)}.")
        if on_nonfinite not in ("error", "skip"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r}; known: error, skip.")
        self.pair, self.corpus, self.drop = pair, corpus, drop
        self.dtype, self.max_tokens, self.on_nonfinite = DTYPES[dtype], max_tokens, on_nonfinite
        self.reasons = drop.reasons(corpus)
        self.candidates = int((self.reasons == KEPT).sum())
        if self.candidates == 0:
            raise EmptyData(
                f"{drop} leaves none of the {corpus.n_tokens:,} tokens of {corpus!r}; keep more of them."
            )
        self.skipped = 0
        self.n_models, self.d_in, measured = self._probe(medians is None)
        self.medians = measured if medians is None else tuple(medians)

    def batch(self, sequences: Int[Tensor, "seq"], where: str = "") -> Harvested:
        """The tokens of these sequences that stay, sequence by sequence; ``where`` is named in errors."""
        numbers = self.corpus.token_numbers(sequences)
        reasons = self.reasons[numbers]
        stays = reasons == KEPT
        dropped = Counter(
            {REASONS[r]: int(n) for r, n in enumerate(reasons.bincount(minlength=256)[:KEPT]) if n}
        )
        x, numbers = self._acts(sequences, stays), numbers[stays]
        norms = x.float().norm(dim=-1)
        if not norms.isfinite().all():
            finite = x.isfinite().all(dim=-1)
            whole = finite.all(dim=-1)
            self._judge(finite, numbers, where)
            dropped["nonfinite"] += int((~whole).sum())
            x, norms, numbers = x[whole], norms[whole], numbers[whole.cpu()]
        if self.drop.sinks is not None:
            limit = self.drop.sinks * torch.tensor(self.medians, device=norms.device)
            calm = (norms <= limit).all(dim=-1)
            dropped["sink"] += int((~calm).sum())
            x, numbers = x[calm], numbers[calm.cpu()]
        sequence = torch.searchsorted(self.corpus.offsets, numbers, right=True) - 1
        return Harvested(x, sequence, numbers - self.corpus.offsets[sequence], +dropped)

    def count(self, sequences: Int[Tensor, "seq"]) -> int:
        """How many tokens of these sequences can stay, norms aside."""
        return int((self.reasons[self.corpus.token_numbers(sequences)] == KEPT).sum())

    def _acts(self, sequences: Tensor, stays: Tensor) -> Float[Tensor, "batch model d_in"]:
        batch = self.corpus.batch(sequences)
        mask = batch.attention_mask.clone()
        mask[batch.attention_mask] = stays
        with torch.no_grad():
            acts = self.pair.capture(batch)
            return acts[mask.to(acts.device)].to(self.dtype)

    def _probe(self, measure: bool) -> tuple[int, int, tuple[float, ...]]:
        """Models, width and, from about 2k tokens spread over the corpus, each model's median norm."""
        order = self.corpus.order()
        sample = order[:: max(1, -(-self.corpus.n_tokens // SAMPLE_TOKENS))] if measure else order[-1:]
        norms, shape = [], (0, 0)
        for group in self.corpus.groups(sample, self.max_tokens):
            x = self._acts(group, self.reasons[self.corpus.token_numbers(group)] == KEPT)
            shape = (x.shape[1], x.shape[2])
            norms.append(x.float().norm(dim=-1).cpu())
        if not measure:
            return *shape, ()
        measured = torch.cat(norms)
        finite = measured[measured.isfinite().all(dim=-1)]
        if len(finite) == 0:
            raise NonFiniteActs(
                f"none of the {len(measured)} sampled tokens has finite activations at {self.pair.hook!r} in both models; "
                "run the models in float32 or bfloat16."
            )
        return *shape, tuple(finite.median(dim=0).values.tolist())

    def refuse_skipped(self, n: int) -> None:
        """Raise NonFiniteActs where so many tokens, of all processes together, were more than may be skipped."""
        if n > (allowed := int(SKIPPED_AT_MOST * self.candidates)):
            raise NonFiniteActs(
                f"{n} tokens are not finite and at most {allowed} of {self.candidates:,} may be skipped; run the models in "
                "float32 or bfloat16."
            )

    def _judge(self, finite: Bool[Tensor, "batch model"], numbers: Tensor, where: str) -> None:
        """Raise for the first token that is not finite, unless it may be skipped."""
        row, model = (~finite).nonzero()[0].tolist()
        self.skipped += int((~finite).any(dim=-1).sum())
        allowed = int(SKIPPED_AT_MOST * self.candidates)
        if self.on_nonfinite == "skip" and self.skipped <= allowed:
            return
        number = int(numbers[row])
        sequence = int(torch.searchsorted(self.corpus.offsets, number, right=True)) - 1
        side = SIDES[model] if model < len(SIDES) else f"number {model}"
        remedy = (
            f"{self.skipped} tokens are not finite and at most {allowed} of {self.candidates:,} may be skipped"
            if self.on_nonfinite == "skip"
            else "on_nonfinite='skip' leaves such tokens out of both models"
        )
        raise NonFiniteActs(
            f"NaN or Inf in the {side} model at {self.pair.hook!r}: sequence {sequence} "
            f"({self.corpus.sources[sequence]}), position {number - int(self.corpus.offsets[sequence])}"
            f"{where and f', {where}'}.  Run the models in float32 or bfloat16; {remedy}."
        )
