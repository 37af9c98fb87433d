import inspect

import pytest
import torch

from tests.analysis.crosscoders import random_acts, random_crosscoder
from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.interventions import ablate, as_forward_hook, compose, steer, substitute
from tl_crosscoder.types import BASE, TUNED

SEQ, POS, D = 3, 5, 6


@pytest.fixture
def crosscoder():
    return random_crosscoder(threshold=0.2)


@pytest.fixture
def acts():
    """Float32 activations of both models, [seq pos model d_in]."""
    return random_acts(SEQ * POS).float().view(SEQ, POS, 2, D)


def codes_of(crosscoder, acts):
    return crosscoder.encode(acts.flatten(0, 1)).view(SEQ, POS, -1).float()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ablating_nothing_or_at_scale_one_is_the_identity(crosscoder, acts):
    base, tuned = acts.unbind(2)
    close(ablate(crosscoder, [], base)(tuned), tuned)
    close(ablate(crosscoder, range(11), base, scale=1.0)(tuned), tuned)
    close(ablate(crosscoder, [], base, part="difference")(tuned), tuned)


@torch.no_grad()
def test_ablation_is_decoding_without_the_latents_with_the_error_kept(crosscoder, acts):
    base, tuned = acts.unbind(2)
    flat = acts.flatten(0, 1)
    f = crosscoder.encode(flat)
    kept = f.clone()
    kept[:, [1, 6]] = 0
    error = flat - crosscoder.decode(f)
    want = (crosscoder.decode(kept) + error)[:, TUNED].view(SEQ, POS, D).float()
    close(ablate(crosscoder, [1, 6], base)(tuned), want)


@torch.no_grad()
def test_undoing_the_difference_removes_only_what_the_base_does_not_write(crosscoder, acts):
    base, tuned = acts.unbind(2)
    f, rows = codes_of(crosscoder, acts), crosscoder.raw_rows().float()
    want = tuned - f[..., [2, 4]] @ (rows[[2, 4], TUNED] - rows[[2, 4], BASE])
    close(ablate(crosscoder, [2, 4], base, part="difference")(tuned), want)


@torch.no_grad()
def test_substitution_follows_the_formula_in_raw_units(crosscoder, acts):
    base, tuned = acts.unbind(2)
    f, rows = codes_of(crosscoder, acts), crosscoder.raw_rows().float()
    want = base + f[..., [0, 3, 9]] @ (rows[[0, 3, 9], TUNED] - rows[[0, 3, 9], BASE])
    close(substitute(crosscoder, [0, 3, 9], base)(tuned), want)
    close(substitute(crosscoder, [0, 3, 9], tuned, model=BASE)(base), want)  # the same, run in the base model
    close(substitute(crosscoder, [], base)(tuned), base)


@torch.no_grad()
def test_all_latents_and_the_bias_give_the_tuned_reconstruction_plus_the_base_error(crosscoder, acts):
    base, tuned = acts.unbind(2)
    recon = crosscoder.decode(crosscoder.encode(acts.flatten(0, 1))).view(SEQ, POS, 2, D).float()
    want = recon[:, :, TUNED] + (base - recon[:, :, BASE])
    close(substitute(crosscoder, range(11), base, include_bias_difference=True)(tuned), want)


@torch.no_grad()
def test_substituted_sets_add_up(crosscoder, acts):
    base, tuned = acts.unbind(2)
    put = lambda ids: substitute(crosscoder, ids, base)(tuned) - base
    close(put([1, 2]) + put([5]), put([1, 2, 5]))


@torch.no_grad()
def test_folding_changes_no_edit(crosscoder, acts):
    base, tuned = acts.unbind(2)
    folded = crosscoder.folded()
    for make in (ablate, substitute):
        close(make(folded, [1, 4], base)(tuned), make(crosscoder, [1, 4], base)(tuned))
    close(steer(folded, [1, 4], 2.0)(tuned), steer(crosscoder, [1, 4], 2.0)(tuned))


@torch.no_grad()
def test_steering_adds_raw_decoder_rows_and_zero_is_the_identity(crosscoder, acts):
    tuned = acts[:, :, TUNED]
    rows = crosscoder.raw_rows().float()
    close(steer(crosscoder, [7], 3.0)(tuned), tuned + 3 * rows[7, TUNED])
    close(steer(crosscoder, [7], 3.0, model=BASE)(tuned), tuned + 3 * rows[7, BASE])
    assert torch.equal(steer(crosscoder, [7], 0.0)(tuned), tuned)


@torch.no_grad()
def test_outside_the_mask_nothing_moves_and_inside_it_everything_does(crosscoder, acts):
    base, tuned = acts.unbind(2)
    mask = torch.zeros(SEQ, POS, dtype=torch.bool)
    mask[0, 2:] = mask[2, 1] = True
    for make in (ablate, substitute):
        masked, whole = (
            make(crosscoder, [0, 1, 2, 3], base, mask=mask)(tuned),
            make(crosscoder, [0, 1, 2, 3], base)(tuned),
        )
        assert torch.equal(masked[~mask], tuned[~mask])
        close(masked[mask], whole[mask])
    steered = steer(crosscoder, [1], 1.0, mask=mask)(tuned)
    assert torch.equal(steered[~mask], tuned[~mask]) and not torch.equal(steered[mask], tuned[mask])


@torch.no_grad()
def test_each_sequence_can_have_its_own_latents(crosscoder, acts):
    base, tuned = acts.unbind(2)
    sets = [[1], [2, 5], []]
    rows = torch.zeros(SEQ, 11, dtype=torch.bool)
    for i, ids in enumerate(sets):
        rows[i, ids] = True
    together = ablate(crosscoder, rows, base)(tuned)
    for i, ids in enumerate(sets):
        close(together[i], ablate(crosscoder, ids, base)(tuned)[i])


@torch.no_grad()
def test_edits_are_pure_and_keep_the_dtype(crosscoder, acts):
    base, tuned = acts.bfloat16().unbind(2)
    before = tuned.clone()
    for edit in (
        steer(crosscoder, [1], 2.0),
        ablate(crosscoder, [1], base),
        substitute(crosscoder, [1], base),
    ):
        assert edit(tuned).dtype == torch.bfloat16
        assert torch.equal(tuned, before)


@torch.no_grad()
def test_composition_runs_in_order_and_the_same_edit_is_a_forward_hook(crosscoder, acts):
    tuned = acts[:, :, TUNED]
    double = lambda a, hook=None: a * 2  # noqa: ARG005
    step = steer(crosscoder, [1], 1.0)
    close(compose(double, step)(tuned), step(tuned * 2))
    hook = as_forward_hook(step)
    close(hook(None, None, tuned), step(tuned))
    assert hook(None, None, (tuned, "cache"))[1] == "cache"


@torch.no_grad()
def test_the_other_models_activations_must_be_of_the_same_tokens(crosscoder, acts):
    base, tuned = acts.unbind(2)
    with pytest.raises(ShapeMismatch, match="lockstep"):
        ablate(crosscoder, [1], base)(tuned[:, -1:])
    close(
        ablate(crosscoder, [1], lambda: base[:, -1:])(tuned[:, -1:]),
        ablate(crosscoder, [1], base)(tuned)[:, -1:],
    )


@torch.no_grad()
def test_a_prompt_mask_lets_every_new_token_be_edited(crosscoder, acts):
    base, tuned = acts.unbind(2)
    mask = torch.zeros(SEQ, 2, dtype=torch.bool)  # the prompt had two positions, none of them edited
    step = ablate(crosscoder, [0, 1, 2, 3], lambda: base[:, :1], mask=mask)
    close(step(tuned[:, :1]), ablate(crosscoder, [0, 1, 2, 3], base)(tuned)[:, :1])
    with pytest.raises(ShapeMismatch, match="mask"):
        step(tuned[:, :3][:, [0]].expand(-1, 3, -1)) if base.shape[1] == 3 else ablate(
            crosscoder, [0], base[:, :3], mask=mask
        )(tuned[:, :3])


def test_unknown_latents_are_refused_with_the_range(crosscoder):
    with pytest.raises(IndexError, match=r"0\.\.10"):
        ablate(crosscoder, [11], torch.zeros(1, 1, D))
    with pytest.raises(ShapeMismatch, match="11"):
        steer(crosscoder, torch.ones(12, dtype=torch.bool), 1.0)


def test_gradients_pass_through_an_edit(crosscoder, acts):
    base, tuned = acts.unbind(2)
    h = tuned.clone().requires_grad_()
    ablate(crosscoder, [1, 2], base)(h).sum().backward()
    close(h.grad, torch.ones_like(h))


def test_an_unknown_part_of_a_latent_is_refused_instead_of_taken_for_the_whole():
    unchecked = inspect.unwrap(ablate)  # the types are checked in tests alone
    with pytest.raises(ValueError, match=r"no part 'differences'.*known: whole, difference"):
        unchecked(random_crosscoder(), [0], torch.zeros(1, 2, D), part="differences")
