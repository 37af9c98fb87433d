"""Latent Scaling's gates: which latents are truly tuned-only.  The verdict, the card and every picture count by them.

Source: Minder et al. 2025, arXiv:2504.02922; the least number of firings is ours.
"""

import pandas as pd

NU_ERROR_GATE, NU_RECON_GATE = 0.2, 0.5
#: Outside of this range a ratio is noise to the authors, who neither draw nor compare it.
NU_LOW, NU_HIGH = -0.1, 2.0
#: Tokens on which a latent must have fired for its ratios to say anything.
LEAST_FIRED = 100


def tuned_specific(
    table: pd.DataFrame,
    *,
    nu_error: float = NU_ERROR_GATE,
    nu_recon: float = NU_RECON_GATE,
    least: int = LEAST_FIRED,
) -> pd.Series:
    """True for latents that Latent Scaling finds absent from the base model: both ratios small, and enough firings to say so.

    ``|nu| below the gate``: a negative ratio as large as a positive one is no evidence of absence.  False where a ratio is
    undefined or the latent fired on fewer than ``least`` tokens.  The study of Latent Scaling also leaves out what lies
    outside ``NU_LOW`` and ``NU_HIGH``, and says how many.
    """
    small = (table["nu_error"].abs() < nu_error) & (table["nu_recon"].abs() < nu_recon)
    return pd.Series((small & (table["n_fired"] >= least)).to_numpy(), index=table.index)
