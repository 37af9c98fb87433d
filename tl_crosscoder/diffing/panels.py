"""What each study adds to the report."""

from typing import Any

import pandas as pd

from tl_crosscoder.report import Panel
from tl_crosscoder.report.plots import behaviour_bars, kl_bars

CONDITIONS = ("tuned", "base", "undo", "remove", "install")


def substitution_panel(number: int, name: str, part: dict[str, Any]) -> Panel:
    """KL bars and their table."""
    table = pd.DataFrame(part["table"])
    panel = Panel(
        key=f"substitution-{number}",
        title=f"What the latents carry: {name}",
        text="The tuned model runs on the base model's activations plus the change that chosen latents would make. "
        "The lower the KL to the untouched tuned model, the more of the change these latents hold.",
        table=table.set_index(["condition", "tokens"]),
        notes=("Intervals: 95 %, bootstrap over whole sequences. Random sets: mean of the draws.",),
    )
    return panel.drawn(lambda: kl_bars(table))


def behaviour_panel(part: dict[str, Any]) -> Panel:
    """Rates under each condition, beside the controls."""
    table = pd.DataFrame(part["table"])
    panel = Panel(
        key="behaviour",
        title="Does the behaviour survive without the latents?",
        text="Undo takes out only the difference a latent makes between the models, remove the whole latent; install adds "
        "the difference to the base model. Matched random sets are as large and as loud.",
        table=table.set_index(["behaviour", "condition"]),
        notes=("Intervals: 95 % Wilson over prompts and draws. Worst: the lowest of the draws.",),
    )
    return panel.drawn(lambda: behaviour_bars(table))
