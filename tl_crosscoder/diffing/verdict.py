"""The sentences a person reads first.  Each states what was measured, also where a pair does not show what one hoped for."""

import pandas as pd

from tl_crosscoder.gates import LEAST_FIRED, tuned_specific
from tl_crosscoder.studies.behaviour import BehaviourResult
from tl_crosscoder.studies.substitution import SubstitutionResult


def verdict(
    table: pd.DataFrame, substitutions: dict[str, SubstitutionResult], behaviour: BehaviourResult | None
) -> list[str]:
    """The headline, then one sentence for each thing that was asked."""
    sentences = [_headline(table, substitutions, behaviour), _classes(table), _fit(table)]
    sentences += [f"On {name}: {result.verdict}" for name, result in substitutions.items()]
    return sentences + (behaviour.verdict if behaviour else [])


def _headline(table, substitutions, behaviour) -> str:
    if behaviour is not None:
        rates = behaviour.table.set_index(["behaviour", "condition"])["rate"]
        undo = [c for c in behaviour.table["condition"].unique() if c.startswith("undo top")]
        if undo:
            n = undo[-1].split()[-1]
            changes = ", ".join(
                f"{name} {rates[name, 'tuned']:.0%} to {rates[name, undo[-1]]:.0%}"
                for name in behaviour.table["behaviour"].unique()
            )
            return f"Undoing {n} of {len(table):,} latents takes the behaviour from: {changes}."
    if substitutions:
        result = next(iter(substitutions.values()))
        kl = result.table[result.table["tokens"] == "all"].set_index("condition")
        top = [c for c in kl.index if c.startswith("top ")]
        if top and kl.loc["none", "kl"] > 0:
            share = kl.loc[top[-1], "recovered"]
            return (
                f"The {top[-1].split()[1]} highest-ranked of {len(table):,} latents carry {share:.0%} of what fine-tuning "
                "changed in the predictions."
            )
    return f"{(table['class'] != 'dead').sum():,} of {len(table):,} latents are alive; nothing causal was asked of them."


def _classes(table: pd.DataFrame) -> str:
    count = table["class"].value_counts()
    alive = table[table["class"] != "dead"]
    text = (
        f"By decoder norms {count.get('tuned_only', 0):,} latents are tuned-only, {count.get('base_only', 0):,} base-only, "
        f"{count.get('shared', 0):,} shared, {count.get('other', 0):,} between, {count.get('dead', 0):,} dead"
    )
    if alive.empty:
        return text + "."
    specific = int(tuned_specific(table).sum())
    rare = int(tuned_specific(table, least=1).sum()) - specific
    text += f"; the largest delta_norm is {alive['delta_norm'].max():.2f}, and both Latent Scaling gates let {specific:,} pass"
    if rare:
        text += f" ({rare:,} more fired on fewer than {LEAST_FIRED} tokens, too few to say)"
    if not count.get("tuned_only", 0):
        text += "; a narrow fine-tune changes part of shared latents, so the ranking goes by the difference they write"
    return text + "."


def _fit(table: pd.DataFrame) -> str:
    m = table.attrs["metrics"]
    return (
        f"The dictionary explains {m['fve_base']:.1%} of the base model's variance, {m['fve_tuned']:.1%} of the tuned model's and "
        f"{m['fve_difference']:.1%} of their difference, with {m['l0']:.1f} latents a token ({m['tokens']:,} held-out tokens)."
    )
