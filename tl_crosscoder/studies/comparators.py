"""Another dictionary of the same place, to be asked what the study's own is asked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from tl_crosscoder.analysis.coactivation import csr
from tl_crosscoder.analysis.table import latent_table
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.studies.dictionaries import Dictionary, Reads


@dataclass(frozen=True)
class Comparator:
    """A second crosscoder, a dictionary of the difference or an SAE of one model, with the table that ranks its latents.

    ``reads``: see :class:`~tl_crosscoder.studies.dictionaries.Dictionary`; a dictionary of one model has to say.
    """

    crosscoder: Crosscoder
    table: pd.DataFrame
    ranking: str = "rank_score"
    reads: Reads = "both"

    @classmethod
    def measured(
        cls,
        crosscoder: Crosscoder,
        batches: Iterable,
        *,
        ranking: str | None = None,
        reads: Reads | None = None,
    ) -> "Comparator":
        """With the table made on ``batches``, raw activations of both models [batch model d_in], or a store of them.

        A crosscoder has its latent table.  Of one model: ``n_fired`` (an SAE: on either model) and ``change``, the mean over tokens
        of the norm of what the latent says has changed, ``|f_j(h_tuned) − f_j(h_base)| ‖d_j‖``, by which it is ranked.
        """
        if reads is None and crosscoder.n_models == 1:
            raise ValueError(
                'a dictionary of one model: say reads="difference" if it was made for tuned − base, "each" for an SAE of one model.'
            )
        dictionary = Dictionary(crosscoder, reads)
        if dictionary.reads == "both":
            return cls(crosscoder, latent_table(crosscoder, batches), ranking or "rank_score")
        return cls(crosscoder, _changes(dictionary, batches), ranking or "change", dictionary.reads)


def _changes(dictionary: Dictionary, batches: Iterable) -> pd.DataFrame:
    d_sae = dictionary.crosscoder.d_sae
    fired, changed, tokens = np.zeros(d_sae), np.zeros(d_sae), 0
    for x in batches:
        more, less = dictionary.codes(x.to(dictionary.change.device))
        tuned: Any = csr(more)
        base: Any = csr(less) if less is not None else tuned * 0
        fired += ((tuned != 0) + (base != 0)).getnnz(0)
        changed += np.asarray(abs(tuned - base).sum(0)).ravel()
        tokens += len(x)
    size = torch.linalg.vector_norm(dictionary.change, dim=1).double().cpu().numpy()
    columns = {"n_fired": fired, "change": changed * size / max(1, tokens)}
    return pd.DataFrame(columns, index=pd.RangeIndex(d_sae, name="latent"))
