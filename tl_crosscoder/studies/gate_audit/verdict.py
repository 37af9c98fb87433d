"""One word for what the audit found, and the reasons in the order in which they were asked.

================== =============================================================================================================
GATE_BROKEN        latents pass where the two sides are the same
DISTRIBUTION_DRIFT no more pass than with a difference without content, or another seed finds others: what any difference gives
STABLE_NOT_CAUSAL  real and found again, and the task does not need them more than it needs others; an effect would have been seen
UNDERPOWERED       nothing passed, nothing was asked, or an effect can neither be shown nor be excluded
PASS               none of these: real, found again, and the task needs them in particular
================== =============================================================================================================
"""

import math
from dataclasses import dataclass
from typing import Literal

Word = Literal["GATE_BROKEN", "DISTRIBUTION_DRIFT", "STABLE_NOT_CAUSAL", "UNDERPOWERED", "PASS"]
ALPHA = 0.05
#: with fewer pairs of latents "not found again" cannot be said
ENOUGH_PAIRS = 3


@dataclass(frozen=True)
class Evidence:
    """What the verdict rests on; NaN: could not be measured.

    Counts are of gated latents, pooled over seeds.  ``share, p_null``: of those of a ``kind`` found again, and the larger
    p of the two nulls, over ``n_pairs`` that could have been.  ``effect`` and on: of the ablation, NaN without a task, with
    the interval ``low, high``; ``accuracy``: the unedited model's; ``harmless_p``: of "without them it moves by ``margin``".
    ``on_minus_off_low``: how much more the task loses than other prompts do, at least, and ``off_low``: what those lose, at
    least; NaN without other prompts.
    """

    target: int
    identity: int
    noise: int
    share: float = math.nan
    p_null: float = math.nan
    n_pairs: int = 0
    kind: str = "non-lexical"
    accuracy: float = math.nan
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    rank_p: float = math.nan
    equivalence_p: float = math.nan
    harmless_p: float = math.nan
    margin: float = math.nan
    mde: float = math.nan
    on_minus_off_low: float = math.nan
    off_low: float = math.nan


def decide(found: Evidence, *, noise_factor: float = 3.0, detectable: float = 0.15) -> tuple[Word, list[str]]:
    """The word and its reasons, the deciding one last.

    ``noise_factor``: the target arm must have more than so many times the latents of the noise arm.  ``detectable``: an ablation
    counts as one without effect where the two are equivalent, or where so small an effect would have been found and the interval
    ends below it.
    """
    said: list[str] = []
    if found.identity:
        passing = "1 latent passes" if found.identity == 1 else f"{found.identity} latents pass"
        return "GATE_BROKEN", [f"{passing} the gate where the two sides are identical"]
    said.append("no latent passes where the two sides are identical")
    if not found.target:
        return "UNDERPOWERED", [
            *said,
            "no latent passes the gate in the pair, so there is nothing to ask about",
        ]
    counts = f"in the pair pass {found.target}, with noise of the same size {found.noise}"
    if found.target <= noise_factor * found.noise:
        return "DISTRIBUTION_DRIFT", [*said, f"{counts}: no more than {noise_factor:g} times as many"]
    said.append(counts)
    if found.n_pairs < ENOUGH_PAIRS or math.isnan(found.p_null):
        pairs = "1 pair" if found.n_pairs == 1 else f"{found.n_pairs} pairs"
        few = f"{pairs} of {found.kind} latents could have been found again by another seed: too few"
        return "UNDERPOWERED", [*said, few]
    again = f"{found.share:.0%} of the latents ({found.kind}) are found again by another seed (p {found.p_null:.2g} of chance)"
    if found.p_null > ALPHA:
        return "DISTRIBUTION_DRIFT", [*said, f"{again}: no more than by chance"]
    return _causal(found, [*said, again], detectable)


def _causal(found: Evidence, said: list[str], detectable: float) -> tuple[Word, list[str]]:
    if math.isnan(found.effect):
        return "UNDERPOWERED", [*said, "no task was given: whether anything needs them was not asked"]
    effect = (
        f"without them the model is right on {found.effect:.0%} fewer prompts than without matched latents "
        f"(interval {found.low:.0%} to {found.high:.0%}; effects from {found.mde:.0%} on would be found)"
    )
    if found.low > 0 and found.rank_p <= ALPHA:
        if math.isnan(found.on_minus_off_low):
            return "PASS", [*said, effect, "whether other prompts need them as much was not asked"]
        if found.on_minus_off_low > 0:
            return "PASS", [*said, effect, "other prompts do not need them as much"]
        if found.off_low > 0:
            return "STABLE_NOT_CAUSAL", [
                *said,
                effect,
                "but other prompts suffer too, not clearly less: no mechanism of this task",
            ]
        return "UNDERPOWERED", [
            *said,
            effect,
            "too few prompts to tell it from what other prompts lose",
        ]
    if found.accuracy <= found.mde:
        seldom = f"the unedited model is right on only {found.accuracy:.0%}: a loss could not have been seen"
        return "UNDERPOWERED", [*said, seldom]
    if found.harmless_p <= ALPHA:
        little = f"taking them out moves the share of right answers by less than {found.margin:.0%} (p {found.harmless_p:.2g})"
        return "STABLE_NOT_CAUSAL", [*said, little]
    if found.equivalence_p <= ALPHA:
        return "STABLE_NOT_CAUSAL", [*said, f"{effect}: equivalent (p {found.equivalence_p:.2g})"]
    if found.high < 0:
        return "STABLE_NOT_CAUSAL", [*said, f"{effect}: matched latents are needed more"]
    if found.low > 0:
        others = f"but some matched sets are needed as much (p {found.rank_p:.2g} of the rank): not these in particular"
        return "UNDERPOWERED", [*said, effect, others]
    if found.mde <= detectable and found.high < detectable:
        return "STABLE_NOT_CAUSAL", [*said, f"{effect}: less than {detectable:.0%} at most"]
    return "UNDERPOWERED", [*said, f"{effect}: too few prompts to say that there is none"]
