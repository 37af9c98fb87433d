"""The first latents of a dictionary, told as a number of them or as a share."""


def first_latents(part: int | float, d_sae: int) -> int:
    """How many latents ``part`` is: an int counts them, a float is a share of ``d_sae``, rounded to the nearest whole latent."""
    counted = isinstance(part, int)
    if not 0 <= part <= (d_sae if counted else 1):
        raise ValueError(
            f"the first latents are counted (an int from 0 to d_sae={d_sae}) or a share (a float from 0.0 to 1.0), got {part!r}"
        )
    return part if counted else round(part * d_sae)
