"""What each column of the latent table is called, means, and how many digits of it are worth showing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """How one column is shown.  ``scale`` multiplies the stored value first (100: per cent); without ``digits``, three figures."""

    label: str
    meaning: str
    digits: int | None = 3
    scale: int = 1


COLUMNS = {
    "class": Column("class", "Which model's decoder holds this latent, judged from the two decoder norms."),
    "delta_norm": Column(
        "Δnorm",
        "Relative difference of the decoder norms: 0 only the base model writes it, ½ both equally, 1 only the tuned one.",
    ),
    "norm_base": Column(
        "‖d‖ base", "Norm of the latent's decoder direction in the base model, normalised units."
    ),
    "norm_tuned": Column(
        "‖d‖ tuned", "Norm of the latent's decoder direction in the tuned model, normalised units."
    ),
    "cosine": Column(
        "cosine",
        "Cosine between the two decoder directions: 1 means that both models write the same direction.",
    ),
    "nu_error": Column(
        "ν error",
        "Latent Scaling on the reconstruction error: near 0 truly tuned-only; near 1 the base model's error holds the latent too.",
    ),
    "nu_recon": Column(
        "ν recon",
        "Latent Scaling on the reconstruction: near 0 truly tuned-only; near 1 other latents already write it for the base model.",
    ),
    "frequency": Column("freq. %", "Share of the tokens on which the latent is active, in per cent.", 3, 100),
    "max_act": Column("max act", "The largest activation that was seen.", 2),
    "difference_share": Column(
        "diff. share %",
        "Signed share of the difference between the two models that this latent writes, in per cent; all sum to about the FVE.",
        2,
        100,
    ),
    "difference_peak": Column(
        "diff. peak", "The largest difference that the latent writes on one token, normalised units.", 2
    ),
    "rank_score": Column(
        "rank %",
        "The score that orders this report: the share of the difference times how far the latent leans to the tuned model.",
        3,
        100,
    ),
}

LATENT = Column(
    "latent", "The latent's number in the dictionary; those with a page of their own are linked.", 0
)


def column(name: str) -> Column:
    """How the column called ``name`` is shown, whether or not this library knows it."""
    return COLUMNS.get(name, Column(name.replace("_", " "), "", None))


def class_key(name: object) -> str:
    """``"tuned_only"`` and ``"Tuned-only"`` are one class."""
    return str(name).strip().lower().replace("_", "-")
