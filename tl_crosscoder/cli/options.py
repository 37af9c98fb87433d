"""The arguments and options that several verbs share, each with its help."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer


def without_bars(quiet: bool) -> bool:
    """With ``--quiet`` the libraries that load models, not imported yet, show no bars of their own either."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return quiet


Base = Annotated[str, typer.Argument(help="Base model: a Hub name or a local folder.")]
Tuned = Annotated[str | None, typer.Argument(help="Fine-tuned model; leave it out with --adapter.")]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter for the base model.")]
Hook = Annotated[str, typer.Option(help="Where to read both models, such as blocks.13.hook_resid_post.")]
Text = Annotated[
    list[str], typer.Option(help=".txt or .jsonl file, folder, or DATASET[:SPLIT[:COLUMN]]; may be repeated.")
]
Prompts = Annotated[
    Path | None, typer.Option(help="Questions, one a line: both models answer, both read both answers.")
]
Behaviours = Annotated[
    Path | None, typer.Option(help='JSON: [{"name", "keywords", "heldout"}], prompts that should show it.')
]
Seed = Annotated[int, typer.Option(help="Fixes the order of the data and the start of the weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="Of the models and the stored activations.")
]
DSae = Annotated[int, typer.Option("--d-sae", help="Latents in the dictionary.")]
K = Annotated[int | None, typer.Option("--k", help="Active latents a token; 32, or the recipe's.")]
Steps = Annotated[int, typer.Option(help="Training steps.")]
BatchSize = Annotated[int, typer.Option(help="Tokens a step.")]
Lr = Annotated[float | None, typer.Option(help="Adam's step size; 1e-3, or the recipe's.")]
InitSame = Annotated[
    float | None,
    typer.Option(help="Share of the latents that start alike in both models; .8, or the recipe's."),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A published training: minder_l1, minder_batchtopk, kissane_l1, papergrade, delta, dsf or dfc.",
    ),
]
Context = Annotated[int, typer.Option(help="Tokens a window of text.")]
Limit = Annotated[int | None, typer.Option(help="At most this many tokens of text.", min=1)]
NewTokens = Annotated[
    int, typer.Option(help="Length of the answers to --prompts' and --behaviours' questions.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.", callback=without_bars)]
