"""The texts that excite a latent most, token by token, with what it writes into each model there."""

from collections.abc import Sequence

import torch
from einops import einsum

from tl_crosscoder.analysis.max_acts import MaxActs
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.models.activations import PairedActivations
from tl_crosscoder.report.example import Example
from tl_crosscoder.types import BASE, TUNED

BEFORE, AFTER = 24, 12  # tokens shown around the peak


@torch.no_grad()
def latent_examples(
    crosscoder: Crosscoder, store: PairedActivations, tops: MaxActs, latents: Sequence[int]
) -> dict[int, list[Example]]:
    """For each of ``latents`` its strongest examples of ``tops``, at most one a sequence, strongest first."""
    tokenizer = store.tokenizer
    crosscoder.eval()
    wanted: dict[int, list[int]] = {}
    for latent in latents:
        for sequence in tops.top_sequences[latent].tolist():
            if sequence >= 0:
                wanted.setdefault(sequence, []).append(latent)
    found: dict[tuple[int, int], Example] = {}
    for sequence, ids in wanted.items():
        for latent, example in _in_sequence(crosscoder, store, tokenizer, sequence, ids).items():
            found[latent, sequence] = example
    return {
        int(latent): [found[latent, s] for s in tops.top_sequences[latent].tolist() if s >= 0]
        for latent in latents
    }


def _in_sequence(crosscoder, store, tokenizer, sequence: int, latents: list[int]) -> dict[int, Example]:
    here = store.rows_of(sequence)
    ids = store.corpus.ids_of(sequence).tolist()
    words = [tokenizer.decode([i]) for i in ids]
    units = crosscoder.units or crosscoder.normalizer
    x = here.x.to(crosscoder.W_dec.dtype)
    acts = torch.zeros(len(ids), len(latents))
    acts[here.position.long()] = crosscoder.encode(x)[:, latents].float()
    encoder = crosscoder.encoder_rows(torch.tensor(latents, device=crosscoder.W_dec.device))
    drive = torch.zeros(len(ids), len(latents), crosscoder.n_models)
    drive[here.position.long()] = einsum(
        units.normalise(x), encoder, "pos model d, latent model d -> pos latent model"
    ).float()
    norms = crosscoder.raw_rows()[latents].norm(dim=-1).float()
    out = {}
    for column, latent in enumerate(latents):
        peak = int(acts[:, column].argmax())
        window = slice(max(0, peak - BEFORE), peak + AFTER + 1)
        f = acts[window, column]
        out[latent] = Example(
            source=store.corpus.sources[sequence],
            sequence=sequence,
            tokens=words[window],
            acts=f.tolist(),
            written_base=(f * norms[column, BASE]).tolist(),
            written_tuned=(f * norms[column, TUNED]).tolist(),
            drive_base=drive[window, column, BASE].tolist(),
            drive_tuned=drive[window, column, TUNED].tolist(),
        )
    return out
