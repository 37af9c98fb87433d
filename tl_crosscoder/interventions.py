"""Edits of a live model's residual stream: steer, ablate, substitute.

Every function returns an :data:`~tl_crosscoder.types.Edit`, ``edit(acts, hook=None) -> acts``: pure, out of
place, computed in float32 and returned in the dtype of ``acts``, always in raw residual units whatever the
normaliser.  The same object is a TransformerLens hook, an nnsight assignment and (through
:func:`as_forward_hook`) a torch forward hook.

The error term is never touched: an edit adds ``Σ_j f_j · (something in the decoder rows)`` to the activations
that came, so whatever the crosscoder does not explain stays exactly as it was.

Only the chosen latents are encoded, and only their rows are held, where the sparsity judges each latent by itself
(all but TopK and GroupMax): an edit of ten latents costs ten latents, and travels as such.

The codes ``f`` need the activations of *both* models at the same tokens: ``other_acts`` is the other model's, a
tensor of the same shape or a function of no arguments that gives them for the forward pass under way
(``ModelPair.generate`` supplies one).

Of models of unlike width each is edited in its own; only what takes one model from the other is refused (ShapeMismatch).

``latents`` is a list of ids, a boolean mask ``[d_sae]``, or a boolean mask ``[seq, d_sae]`` with one set for
each sequence. ``mask [seq pos]`` is True where the edit applies; elsewhere the activations pass unchanged.  In
a generation step with a key-value cache (one position, a longer mask) the new tokens are edited."""

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.analysis.base import evaluating
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.types import BASE, TUNED, Edit
from tl_crosscoder.widths import padded, refuse_unlike

OtherActs = Tensor | Callable[[], Tensor]
Latents = Iterable[int] | Tensor
Part = Literal["whole", "difference"]
#: Of more latents than this share, all are encoded: a copy of most of the weights would save nothing.
FEW = 0.5


def steer(
    crosscoder: Crosscoder,
    latents: Latents,
    strength: float,
    *,
    model: int = TUNED,
    mask: Bool[Tensor, "seq pos"] | None = None,
) -> Edit:
    """Add ``strength`` times the latents' decoder rows of ``model``, as if each fired at ``strength``.  0: the identity."""
    chosen = latent_mask(crosscoder, latents)
    rows = _raw_rows(crosscoder, model)
    direction = chosen.to(rows.dtype) @ rows * strength  # [d_in], or [seq d_in] with a set for each sequence

    def edit(acts: Tensor, hook: object = None) -> Tensor:  # noqa: ARG001
        shift = direction if direction.ndim == 1 else direction[:, None]
        return _where(mask, acts, acts.float() + shift.to(acts.device))

    return edit


def ablate(
    crosscoder: Crosscoder,
    latents: Latents,
    other_acts: OtherActs,
    *,
    part: Part = "whole",
    scale: float = 0.0,
    model: int = TUNED,
    mask: Bool[Tensor, "seq pos"] | None = None,
) -> Edit:
    """Remove what the latents write into ``model``: ``h + (scale − 1) Σ f_j d_j^model``.  No latents, or scale
    1: the identity.

    ``part="difference"`` removes only what the other model does not have, ``f_j (d_j^model − d_j^other)``: the
    specific edit, which leaves what both models write alone.  Removing whole latents also removes the shared
    part and is not specific on narrow fine-tunes."""
    if part not in get_args(Part):
        raise ValueError(f"no part {part!r} of a latent; known: {', '.join(get_args(Part))}")
    other = _other(model)
    if part == "difference":
        refuse_unlike(crosscoder, "the difference that a latent makes")

    def removed(rows: Tensor) -> Tensor:
        written = rows[:, model] - rows[:, other] if part == "difference" else rows[:, model]
        return written * (scale - 1)

    return _add_codes(crosscoder, latents, other_acts, removed, model, mask, onto="own")


def substitute(
    crosscoder: Crosscoder,
    latents: Latents,
    other_acts: OtherActs,
    *,
    include_bias_difference: bool = False,
    model: int = TUNED,
    mask: Bool[Tensor, "seq pos"] | None = None,
) -> Edit:
    """Replace the activations by ``h_base + Σ_j f_j (d_j^tuned − d_j^base)``: the base model with only these
    latents' change.

    No latents: the base model's activations.  All latents: the tuned reconstruction plus the base error, with
    the *base* decoder bias (the paper's formula); ``include_bias_difference=True`` adds ``b_tuned − b_base`` as
    well.  ``model`` is the model the edit runs in: in the tuned model ``other_acts`` are the base activations,
    in the base model (``model=BASE``) the tuned ones.

    Source: Minder et al. 2025, arXiv:2504.02922, causal experiments.
    """
    refuse_unlike(crosscoder, "substitute")
    changed = lambda rows: rows[:, TUNED] - rows[:, BASE]
    bias = _bias_difference(crosscoder) if include_bias_difference else None
    onto = "own" if model == BASE else "other"
    return _add_codes(crosscoder, latents, other_acts, changed, model, mask, onto=onto, bias=bias)


def compose(*edits: Edit) -> Edit:
    """One edit that applies the given ones in order, each to what the one before left.

    Codes are read off the activations that come, so two ablations in a row differ from one ablation of both sets.
    """

    def edit(acts: Tensor, hook: object = None) -> Tensor:
        for step in edits:
            acts = step(acts, hook=hook)
        return acts

    return edit


def as_forward_hook(edit: Edit) -> Callable:
    """The edit as a torch forward hook, for modules that return a tensor or a tuple that starts with one."""

    def forward_hook(_module, _inputs, output):
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return forward_hook


def latent_mask(crosscoder: Crosscoder, latents: Latents) -> Bool[Tensor, "*seq d_sae"]:
    """``latents`` as a boolean mask; ids outside ``0 .. d_sae − 1`` and masks of another width raise."""
    device = crosscoder.W_dec.device
    if isinstance(latents, Tensor) and latents.dtype == torch.bool:
        if latents.shape[-1] != crosscoder.d_sae:
            raise ShapeMismatch(f"a latent mask wants {crosscoder.d_sae} entries, got {latents.shape[-1]}.")
        return latents.to(device)
    ids = torch.as_tensor([int(j) for j in latents], dtype=torch.long, device=device)
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < crosscoder.d_sae):
        raise IndexError(
            f"latents {int(ids.min())}..{int(ids.max())} asked for; this crosscoder has 0..{crosscoder.d_sae - 1}."
        )
    return torch.zeros(crosscoder.d_sae, dtype=torch.bool, device=device).index_fill_(0, ids, True)


def _raw_rows(crosscoder: Crosscoder, model: int) -> Float[Tensor, "d_sae d_in"]:
    """One model's decoder."""
    _check_model(crosscoder, model)
    return crosscoder.raw_rows().detach()[:, model, : crosscoder.widths[model]]


def _check_model(crosscoder: Crosscoder, model: int) -> None:
    if not 0 <= model < crosscoder.n_models:
        raise ValueError(f"model={model}: this crosscoder has models 0..{crosscoder.n_models - 1}.")


def _other(model: int) -> int:
    if model not in (BASE, TUNED):
        raise ValueError(f"model={model}: an edit knows model 0 (base) and model 1 (tuned).")
    return TUNED if model == BASE else BASE


def _bias_difference(crosscoder: Crosscoder) -> Float[Tensor, " d_in"]:
    """``b_tuned − b_base`` in raw units, the normaliser's means included: what is reconstructed when nothing fires."""
    bias = crosscoder.decode(crosscoder.W_dec.new_zeros(1, crosscoder.d_sae)).detach()[0].float()
    return bias[TUNED] - bias[BASE]


def _add_codes(
    crosscoder: Crosscoder,
    latents: Latents,
    other_acts: OtherActs,
    rows_of: Callable[[Tensor], Tensor],
    model: int,
    mask: Tensor | None,
    *,
    onto: Literal["own", "other"],
    bias: Tensor | None = None,
) -> Edit:
    """``onto + Σ_j f_j rows_j (+ bias)`` where ``mask``; f from the two models' true activations.

    ``rows_of`` makes each latent's row of the models' raw rows [latent model d_in]; it is linear in them.
    """
    _check_model(crosscoder, model)
    few, chosen = _cut_down(crosscoder, latent_mask(crosscoder, latents))
    raw = few.raw_rows().detach()
    rows = rows_of(raw)
    other_model = _other(model)

    def edit(acts: Tensor, hook: object = None) -> Tensor:  # noqa: ARG001
        other = (other_acts if isinstance(other_acts, Tensor) else other_acts()).to(acts.device)
        width, d_in, widths = acts.shape[-1], few.d_in, few.widths
        sides = (model, acts), (other_model, other)  # each padded, or as its model has it
        fit = all(x.shape[-1] in (d_in, *widths[m : m + 1]) for m, x in sides)
        if not fit or other.shape[:-1] != acts.shape[:-1]:
            raise ShapeMismatch(
                f"the edit got activations {list(acts.shape)} and the other model's {list(other.shape)}; they must be of "
                "the same tokens. While generating, use ModelPair.generate, which runs the other model in lockstep."
            )
        own, other = (padded(x.float(), d_in) for x in (acts, other))
        start = own if onto == "own" else other
        pair = torch.stack([own, other] if model < other_model else [other, own], dim=-2)
        where = _everywhere(acts) if mask is None else _fit(mask, acts)
        device = rows.device
        with evaluating(few):  # gradients pass through the activations, not through the codes
            codes = few.encode_sparse(pair[where].to(device))
            sequence = where.nonzero().to(device)[codes.tokens(), 0]
            allowed = chosen[codes.latents] if chosen.ndim == 1 else chosen[sequence, codes.latents]
            kept = codes.with_values(codes.values * allowed)
            # where each model chooses for itself, what is written into it is known after decoding only
            written = kept.decode(rows) if codes.gates is None else rows_of(kept.decode(raw))
            written = written.float()
            written = (written if bias is None else written + bias).to(acts.device)
        result = torch.where(where[..., None], start, own)
        result[where] = result[where] + written
        return result[..., :width].to(acts.dtype).contiguous()

    return edit


def _cut_down(
    crosscoder: Crosscoder, chosen: Bool[Tensor, "*seq d_sae"]
) -> tuple[Crosscoder, Bool[Tensor, "*seq latent"]]:
    """The crosscoder of the chosen latents alone, where that is smaller and possible, and their mask."""
    ids = chosen.reshape(-1, chosen.shape[-1]).any(0).nonzero()[:, 0]
    if len(ids) > FEW * crosscoder.d_sae or crosscoder.sparsity.restricted(ids) is None:
        return crosscoder, chosen
    ids = ids if len(ids) else ids.new_zeros(1)  # one latent, not chosen
    return crosscoder.restricted(ids), chosen[..., ids]


def _fit(mask: Tensor, acts: Tensor) -> Tensor:
    """The mask for this forward pass: as it is, or all True in a step that has only new tokens."""
    if mask.shape == acts.shape[:-1]:
        return mask.to(acts.device)
    if acts.shape[:-1] == (mask.shape[0], 1):
        return _everywhere(acts)
    raise ShapeMismatch(
        f"the edit's mask is [seq, pos] = {list(mask.shape)}, the activations are {list(acts.shape)}."
    )


def _everywhere(acts: Tensor) -> Tensor:
    return torch.ones(acts.shape[:-1], dtype=torch.bool, device=acts.device)


def _where(mask: Tensor | None, acts: Tensor, edited: Tensor) -> Tensor:
    if mask is not None:
        edited = torch.where(_fit(mask, acts)[..., None], edited, acts.float())
    return edited.to(acts.dtype)
