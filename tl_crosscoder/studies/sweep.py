"""The answers of a pair to a few prompts under one vector at many strengths, and how likely the unsteered models find them."""

import math
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.models.answers import turn_ends
from tl_crosscoder.models.backends import Backend
from tl_crosscoder.models.backends.generation import extended
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair, Side
from tl_crosscoder.models.shift import shift
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.studies.where import kept_tokens

SIDES: tuple[Side, Side] = ("base", "tuned")
ROWS_AT_ONCE, SCORED_AT_ONCE = 128, 32

Answer = dict[str, Any]


class Sweep:
    """``typical_norm``: of each model's residual stream at the prompts' kept tokens, the median.

    ``about``: all that the answers depend on but the vectors and strengths.
    """

    def __init__(
        self,
        pair: ModelPair,
        prompts: list[str],
        ordinary: Corpus | None,
        *,
        drop: Drop,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ):
        self.pair, self.prompts, self.n = pair, prompts, max_new_tokens
        self.about: dict[str, Any] = {
            "models": pair.fingerprint,
            "prompts": prompts,
            "text": None if ordinary is None else ordinary.sha256,
            "drop": asdict(drop),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        self.stops = turn_ends(pair)
        self.sampling = {"temperature": temperature, "seed": seed, "stop_ids": self.stops}
        self.batch, self.mask, acts = self._open(Corpus.prompts(prompts, pair.tokenizer), drop, "left")
        norms = acts[self.mask].float().norm(dim=-1)
        self.typical_norm = {
            s: float(norms[:, m].median()) if len(norms) else math.nan for m, s in enumerate(SIDES)
        }
        self.text = (
            self._open(ordinary, drop, "right")[:2] if ordinary is not None and len(ordinary) else None
        )

    def speak(self, side: Side, vector: Float[Tensor, " d_in"], strengths: list[float]) -> list[Answer]:
        """Strength by strength and prompt by prompt: the answer, its ``n_tokens`` and Σ −log p under each unsteered model, and
        the mean −log p of ordinary text under the model at that strength."""
        backend = self.pair.sides(side)[0]
        jobs = [(s, row) for s in strengths for row in range(len(self.batch))]
        out: list[Answer] = []
        for start in range(0, len(jobs), ROWS_AT_ONCE):
            these = jobs[start : start + ROWS_AT_ONCE]
            rows = [row for _, row in these]
            batch = self.batch.rows(rows)
            edits = self._edits(vector, [s for s, _ in these], self.mask[rows])
            new = backend.generate(batch, self.n, edits, **self.sampling).cpu()
            n_tokens, surprise = self._surprise(batch, new)
            texts = self.pair.tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, (strength, row) in enumerate(these):
                likelihood = {f"nll_{s}": surprise[s][i] for s in SIDES} | {"n_tokens": n_tokens[i]}
                said = {"strength": strength, "prompt": self.prompts[row], "answer": texts[i].strip()}
                out.append(said | likelihood)
        text = {s: self._text_nll(backend, vector, s) for s in strengths}
        return [answer | {"nll_text": text[answer["strength"]]} for answer in out]

    def _open(self, corpus: Corpus, drop: Drop, pad: Any) -> tuple[TokenBatch, Tensor, Tensor]:
        batch = corpus.batch(range(len(corpus)), pad=pad)
        acts = self.pair.capture(batch)
        return batch, kept_tokens(batch, acts, drop).cpu(), acts.cpu()

    def _edits(self, vector: Tensor, strengths: list[float], mask: Tensor) -> dict[str, Any]:
        return {self.pair.hook: shift(torch.tensor(strengths)[:, None] * vector, mask)}

    def _surprise(self, batch: TokenBatch, new: Tensor) -> tuple[list[int], dict[Side, list[float]]]:
        """Of each answer, up to and with what ends it: the tokens, and the sum of −log p under each unedited model."""
        stop = torch.isin(new, torch.tensor(sorted(self.stops)))
        real = stop.long().cumsum(1) - stop.long() == 0
        sums: dict[Side, list[float]] = {side: [] for side in SIDES}
        for rows in torch.arange(len(new)).split(SCORED_AT_ONCE):
            tokens = extended(batch.rows(rows), new[rows])
            for side, found in sums.items():
                surprise = nll(self.pair.sides(side)[0], tokens, {})[:, -new.shape[1] :]
                found += (surprise * real[rows]).sum(1).tolist()
        return real.sum(1).tolist(), sums

    def _text_nll(self, backend: Backend, vector: Tensor, strength: float) -> float:
        if self.text is None:
            return math.nan
        batch, mask = self.text
        total, count = 0.0, 0
        for rows in torch.arange(len(batch)).split(SCORED_AT_ONCE):
            surprise = nll(backend, batch.rows(rows), self._edits(vector, [strength] * len(rows), mask[rows]))
            counted = mask[rows][:, :-1] & batch.attention_mask[rows][:, 1:]
            total, count = total + float((surprise * counted).sum()), count + int(counted.sum())
        return total / count if count else math.nan


def nll(backend: Backend, tokens: TokenBatch, edits: dict[str, Any]) -> Float[Tensor, "seq pos"]:
    """−log p of each token but the first of a row, in nats."""
    logits = backend.run(tokens, edits)[:, :-1].float()
    following = tokens.ids[:, 1:].to(logits.device)[..., None]
    return (logits.logsumexp(-1) - logits.gather(-1, following)[..., 0]).cpu()
