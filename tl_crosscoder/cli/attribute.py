"""Attribution: which latents does a prediction rest on?"""

from typing import Annotated

import typer

from tl_crosscoder.cli.app import app
from tl_crosscoder.cli.options import Adapter, Device, Dtype, Json
from tl_crosscoder.cli.runs import Run, RunBase, RunTuned, keep, open_run

LONGEST = 1 << 20  # tokens: a prompt is never cut


@app.command("attribute")
def attribute_command(
    run: Run,
    base: RunBase = None,
    tuned: RunTuned = None,
    *,
    prompt: Annotated[str, typer.Option(help="A user's message; with --plain, text to be continued.")],
    correct: Annotated[str, typer.Option(help="What may come next: its first token counts.")],
    wrong: Annotated[str, typer.Option(help="What it is compared with.")],
    plain: Annotated[bool, typer.Option("--plain", help="No chat template.")] = False,
    answer: Annotated[str, typer.Option(help="Words the assistant has said already.")] = "",
    top: Annotated[int, typer.Option(help="Latents that are also ablated.")] = 20,
    adapter: Adapter = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Split the difference of two logits among the latents, in both models, by gradient and by ablation."""
    import torch

    from tl_crosscoder.models.corpus import Corpus
    from tl_crosscoder.models.drop import Drop
    from tl_crosscoder.studies.attribution import attribution

    opened = open_run(run, base, tuned, adapter, device=device, dtype=dtype)
    tokenizer = opened.pair.tokenizer
    whole = {"windows": False, "context": LONGEST}
    corpus = Corpus.from_texts([prompt], tokenizer, **whole) if plain else Corpus.prompts([prompt], tokenizer)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    first = [encode(correct)[:1], encode(wrong)[:1]]
    if not all(first) or first[0] == first[1]:
        raise ValueError(
            f"{correct!r} and {wrong!r} begin with the same token, or with none; give words that differ."
        )
    ids = torch.cat([corpus.ids_of(0).long(), torch.tensor(encode(answer), dtype=torch.long)])
    drop = Drop(**opened.report.store.manifest["drop"])
    result = attribution(
        opened.report.crosscoder.to(device), opened.pair, ids[None], first[0], first[1], top=top, drop=drop
    )
    keep(opened.report, result, as_json)
