"""One row a latent: every analysis joined, in one streaming pass over the activations."""

from collections.abc import Iterable, Sequence

import pandas as pd

from tl_crosscoder.analysis.base import Analysis, run
from tl_crosscoder.analysis.decoder_norms import DecoderNorms, classify
from tl_crosscoder.analysis.difference_share import DifferenceShare
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_scaling import LatentScaling
from tl_crosscoder.analysis.max_acts import MaxActs
from tl_crosscoder.analysis.reconstruction import Reconstruction
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.widths import alike

ANALYSES: tuple[type[Analysis], ...] = (
    DecoderNorms,
    Firing,
    DifferenceShare,
    LatentScaling,
    Reconstruction,
    MaxActs,
)


def latent_table(
    crosscoder: Crosscoder, batches: Iterable, analyses: Sequence[Analysis] | None = None
) -> pd.DataFrame:
    """One row a latent (index ``latent``); ``table.attrs["metrics"]`` holds the figures about the whole dictionary.

    ``batches``: held-out activations, a store or an iterable of raw ``[batch model d_in]`` tensors.  Columns:
    decoder norms in normalised units, ``delta_norm`` (tuned-high = 1), ``class`` (base_only < .1, shared .4-.6,
    tuned_only > .9, other; dead = never fired on these tokens), ``cosine``, ``frequency``, ``max_act``,
    ``difference_share``, ``difference_peak``, ``rank_score``, Latent Scaling (``beta_*``, ``nu_error``,
    ``nu_recon``) and the place of the strongest example.  Undefined values are NaN.

    ``rank_score = difference_share · max(0, 2 delta_norm − 1)`` orders latents by how much of the change they
    write and how tuned-high they are; on narrow fine-tunes it finds what ``delta_norm`` alone misses.

    A crosscoder of one model, such as a dictionary of the difference, has no columns that compare models; one of models of
    unlike width none that compare their directions: no difference, Latent Scaling or ``rank_score``, ``cosine`` is NaN."""
    makes = [make for make in ANALYSES if crosscoder.n_models > 1 or not make.compares_models]
    makes = [make for make in makes if alike(crosscoder) or not make.one_space]
    parts = list(analyses) if analyses is not None else [make(crosscoder) for make in makes]
    run(crosscoder, batches, parts)
    columns = {name: values.cpu().numpy() for part in parts for name, values in part.columns().items()}
    table = pd.DataFrame(columns, index=pd.RangeIndex(crosscoder.d_sae, name="latent"))
    if {"difference_share", "delta_norm"} <= set(table):
        specific = (2 * table["delta_norm"] - 1).clip(lower=0)
        table["rank_score"] = table["difference_share"] * specific
    if {"n_fired", "delta_norm"} <= set(table):
        table["class"] = classify(table["delta_norm"], table["n_fired"])
    table.attrs["metrics"] = {name: value for part in parts for name, value in part.metrics().items()}
    return table


def ranked(table: pd.DataFrame, column: str) -> list[int]:
    """The live latents, highest in ``column`` first; those without a value are left out, ties keep the lower id."""
    if column not in table:
        raise KeyError(
            f"no column {column!r} to rank by; the table has: {', '.join(map(str, table.columns))}"
        )
    alive = table.loc[table["n_fired"].to_numpy() > 0, [column]].dropna()
    return alive.sort_values(column, ascending=False, kind="stable").index.tolist()
