"""The latent table as a study reads it: row j is about latent j."""

from typing import TypeVar

import pandas as pd

Rows = TypeVar("Rows", pd.DataFrame, pd.Series)


def by_latent(rows: Rows, d_sae: int) -> Rows:
    """The same rows, latent 0 first, in whatever order they came.

    Raises ValueError unless there is one for each of ``d_sae`` latents: what is left out could not be told from what never fired.
    """
    ordered = rows.sort_index()
    if ordered.index.tolist() != list(range(d_sae)):
        raise ValueError(
            f"wanted the latent table with a row for each of {d_sae:,} latents, in any order, got {len(rows):,} rows; "
            "pass the whole table."
        )
    return ordered
