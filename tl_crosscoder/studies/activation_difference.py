"""What the mean change of the activations alone tells, without a dictionary: the baseline that every dictionary has to beat.

On the first tokens of unrelated documents the mean of h_tuned − h_base is taken, position by position.  A narrow fine-tune often
leaves a constant there: read through the unembedding it may name its subject, added to the base model it may install the
behaviour, taken from the tuned model it may remove it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.data.planted import Behaviour
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.figures import Drawing
from tl_crosscoder.figures.activation_difference import DIFFERENCE, RANDOM, curve, difference_figure
from tl_crosscoder.figures.text import visible
from tl_crosscoder.models.backends.unembed import unembed
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.studies.difference_steering import WAYS, rates, steered_answers
from tl_crosscoder.studies.first_tokens import FirstTokens
from tl_crosscoder.studies.parts import Parts
from tl_crosscoder.studies.progress import tracked
from tl_crosscoder.studies.result import StudyResult
from tl_crosscoder.widths import refuse_unlike

FIRST = 5


@dataclass(frozen=True)
class ActivationDifferenceResult(StudyResult):
    """``table``: a row for each ``position`` among a document's first tokens, and ``all`` of them together.

    ``n`` tokens that were counted, ``norm`` of the mean difference in raw units, ``share``: that norm over the mean norm of the
    single tokens' differences (1: the same shift everywhere), ``relative_norm``: over the mean norm of the tuned model's
    activations there, ``split_cosine`` between the means over every other document (near 0: noise), ``promoted`` and
    ``suppressed``: the tokens that the tuned model's final norm and unembedding make of it.  NaN and no tokens where nothing was
    counted or nothing differs.

    ``steered``: behaviour, ``how``, ``direction``, ``strength`` (the norm of what is added or subtracted, over the same mean norm;
    ``relative_norm`` of ``all`` is the mean difference as it is), ``rate`` of the answers that show the behaviour with ``low,
    high`` (95 % Wilson over ``n`` answers; random directions of the same norm are pooled), ``rate_coherent``: that show it and
    are coherent, ``gone``: that are coherent and do not show it.  ``answers``: every answer.
    ``vectors``: the mean differences, raw, for further use; empty where nothing was counted.
    """

    key: ClassVar = "activation-difference"
    title: ClassVar = "The mean difference, without a dictionary"
    text: ClassVar = (
        "The mean of tuned − base over the first tokens of unrelated documents, read through the unembedding, added to the base "
        "model and subtracted from the tuned one."
    )
    notes: ClassVar = (
        "Tokens left out of the capture (the first of a text, attention sinks) are left out here: that position has no figures. "
        "Coherent: at most as surprising to one of the two models as the most surprising answer given without steering.",
    )
    index: ClassVar = ("position",)

    table: pd.DataFrame
    steered: pd.DataFrame
    answers: pd.DataFrame
    vectors: list[list[float]]

    @property
    def verdict(self) -> list[str]:
        """How constant the change is and what it reads as; a sentence for each behaviour on what steering did."""
        whole: Any = self.table.set_index("position").loc["all"]
        if not whole["norm"] > 0:
            return [
                "the two models have the same mean activations on these tokens: there is nothing to read or to steer with."
            ]
        cosine = whole["split_cosine"]
        halves = (
            f"cosine of two halves of the documents {cosine:.2f}"
            if cosine == cosine
            else "too few documents to halve"
        )
        said = [
            f"the mean difference is {whole['share']:.0%} of a single token's difference and {whole['relative_norm']:.1%} of an "
            f"activation's norm ({halves}); it reads: {whole['promoted']}."
        ]
        names = self.steered["behaviour"].unique() if len(self.steered) else []
        return said + [self._sentence(name) for name in names]

    def _sentence(self, behaviour: str) -> str:
        parts = []
        for how, (_, _, goal, words) in WAYS.items():
            plain, own = curve(self.steered, behaviour, how, DIFFERENCE, goal)
            _, drawn = curve(self.steered, behaviour, how, RANDOM, goal)
            itself = own[self._itself()]
            where = f" at {own.idxmax():.3g} of an activation's norm" if own.max() > plain else ""
            parts.append(
                f"{how}, {words}: {plain:.0%} without, {itself:.0%} as it is, at most {own.max():.0%}{where} (random directions "
                f"together at most {drawn.max():.0%})"
            )
        return f"{behaviour}, coherent answers; {'; '.join(parts)}."

    def _itself(self) -> float:
        """The strength of the mean difference as it is."""
        return float(self.table.set_index("position").loc["all", "relative_norm"])

    def plot(self) -> Drawing:
        """The norm at each position; for each behaviour the rate over strength."""
        return difference_figure(self.table, self.steered)


def activation_difference(
    pair: ModelPair,
    documents: Corpus,
    behaviours: Sequence[Behaviour] = (),
    *,
    n_first: int = FIRST,
    n_tokens: int = 10,
    strengths: Sequence[float] = (0.125, 0.25, 0.5),
    n_controls: int = 3,
    drop: Drop | None = None,
    max_new_tokens: int = 16,
    max_tokens: int = 4096,
    seed: int = 0,
    parts: str | Path | None = None,
    progress: bool = True,
) -> ActivationDifferenceResult:
    """The mean difference over the first ``n_first`` tokens of documents that have nothing to do with a behaviour.

    ``documents``: plain texts; chats all begin with the same template, whose tokens say little.  ``drop``, as in
    :func:`capture`: tokens that are not counted, and tokens of a prompt that are not steered.  The direction of steering is the
    mean over all counted tokens, added as it is and at ``strengths``, multiples of the tuned model's mean norm there; answers to
    the behaviours' held-out prompts are greedy and judged by the keywords.  ``parts``: a
    folder in which finished parts are kept, so that the same call goes on after a kill.

    Source: Minder et al. 2025, activation difference lens (mean over the first tokens of unrelated text).
    """
    if n_first < 1 or not len(documents):
        raise EmptyData(
            f"activation_difference wants a document or more and n_first of at least 1, got {len(documents)} and {n_first}."
        )
    if not all(math.isfinite(s) and s > 0 for s in strengths):
        raise ValueError(
            f"strengths are finite numbers above 0, the sign is that of the verb; got {list(strengths)}."
        )
    refuse_unlike(pair, "activation_difference")
    drop = drop or Drop()
    sums = FirstTokens(n_first, pair.d_in)
    groups = list(documents.batches(max_tokens))
    for indices, batch in tracked(groups, "first tokens", len(groups), progress):
        sums.add(pair, batch, indices, drop)
    if not sums.count.sum():
        raise EmptyData(
            f"no token among the first {n_first} of {len(documents)} documents is left after {drop}; pass longer "
            "documents, a larger n_first, or Drop(first=False)."
        )
    means = sums.means()
    table = sums.table(means)
    table["promoted"], table["suppressed"] = _lens(pair, means, n_tokens)
    steered, answers = pd.DataFrame(), pd.DataFrame()
    if behaviours and bool(means[-1].norm() > 0):
        itself = float(table["relative_norm"].iloc[-1])
        usual = float(means[-1].norm()) / itself
        norms = {s: s * usual for s in sorted({itself, *map(float, strengths)})}
        about = {
            "models": pair.fingerprint,
            "vector": means[-1].tolist(),
            "norms": list(norms.items()),
            "drop": asdict(drop),
        }
        about |= {"max_new_tokens": max_new_tokens, "n_controls": n_controls, "seed": seed}
        kept = Parts(parts, study="activation-difference", **about)
        said = [
            steered_answers(pair, behaviour, means[-1], norms, n_controls, drop, max_new_tokens, seed, kept)
            for behaviour in tracked(behaviours, "steering", len(behaviours), progress)
        ]
        answers = pd.concat(said, ignore_index=True)
        steered = rates(answers)
    vectors = [row.tolist() if row.isfinite().all() else [] for row in means]
    return ActivationDifferenceResult(table, steered, answers, vectors)


def _lens(pair: ModelPair, means: Float[Tensor, "place d_in"], n: int) -> tuple[list[str], list[str]]:
    """For each row, the tokens with the highest and the lowest logit; nothing for a row without a direction."""
    known = means.norm(dim=-1) > 0
    words: tuple[list[str], list[str]] = ([], [])
    found = iter(unembed(pair.tuned, means[known].float().to(pair.tuned.device)) if known.any() else ())
    for row in known.tolist():
        scores = next(found)[: len(pair.tokenizer)] if row else None
        for sign, said in zip((1, -1), words, strict=True):
            ids = [] if scores is None else (sign * scores).topk(min(n, len(scores))).indices.tolist()
            said.append(" ".join(f"«{_shown(pair.tokenizer, i)}»" for i in ids))
    return words


def _shown(tokenizer: Any, token: int) -> str:
    """A token without the space before it; what would be nothing as its entry in the vocabulary."""
    return visible(tokenizer.decode([token])).strip() or str(tokenizer.convert_ids_to_tokens(token))
