"""The baseline without a dictionary: what the mean difference of the activations tells."""

from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Adapter, Behaviours, Device, Dtype, Json, NewTokens, Quiet, Seed
from tl_crosscoder.cli.output import say
from tl_crosscoder.cli.runs import Run, RunBase, RunTuned, keep, open_run


@app.command("activation-difference")
@stoppable()
def activation_difference_command(
    run: Run,
    base: RunBase = None,
    tuned: RunTuned = None,
    *,
    adapter: Adapter = None,
    behaviours: Behaviours = None,
    first: Annotated[int, typer.Option(help="Tokens of each document that are looked at.")] = 5,
    documents: Annotated[int, typer.Option(help="Documents at most.")] = 10_000,
    max_new_tokens: NewTokens = 16,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The mean difference over the first tokens of the run's plain texts: logit lens, and steering with it."""
    opened = open_run(run, base, tuned, adapter, behaviours, device=device, dtype=dtype)
    from tl_crosscoder.models.drop import Drop
    from tl_crosscoder.studies.activation_difference import activation_difference

    corpus = opened.report.store.corpus
    plain = [i for i in range(len(corpus)) if not corpus.flags_of(i)["assistant"].any()][:documents]
    if not plain:
        say(quiet)(
            "the run has no plain text: the first tokens of its chats are read, most of them the template's"
        )
    result = activation_difference(
        opened.pair,
        corpus.select(plain or range(min(len(corpus), documents))),
        opened.behaviours,
        n_first=first,
        drop=Drop(**opened.report.store.manifest["drop"]),
        max_new_tokens=max_new_tokens,
        seed=seed,
        parts=opened.parts,
        progress=not quiet,
    )
    keep(opened.report, result, as_json)
