"""The judge that a verb's options name."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tl_crosscoder.studies.openai_judge import OpenAIJudge

JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="A language model that judges, at OPENAI_BASE_URL, its key in OPENAI_API_KEY; without it a rule that works offline.",
    ),
]


def open_judge(model: str | None) -> "OpenAIJudge | None":
    """The language model of that name as a judge; None for the rule that works offline."""
    from tl_crosscoder.studies.openai_judge import OpenAIJudge

    return None if model is None else OpenAIJudge(model)
