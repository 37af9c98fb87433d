"""The training loop."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses import MSE, AuxK, Loss, Progress
from tl_crosscoder.dictionary.sparse_ops import summed_by
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.data import Feed, geometric_median, refuse_fractions, refuse_store
from tl_crosscoder.training.dead import FiringRecord
from tl_crosscoder.training.history import History
from tl_crosscoder.training.interrupt import graceful_interrupt
from tl_crosscoder.training.keeper import Keeper
from tl_crosscoder.training.optimizer import Adam
from tl_crosscoder.training.sharding import agree, check
from tl_crosscoder.training.sinks import Sink, sinks
from tl_crosscoder.training.state import TrainingState
from tl_crosscoder.training.window import Window


def train(
    crosscoder: Crosscoder,
    batches: Iterable[Tensor],
    losses: Sequence[Loss] | None = None,
    config: TrainConfig | None = None,
    *,
    checkpoints: str | Path | None = None,
    resume: str | Path | None = None,
) -> History:
    """The history of minimising the sum of ``losses`` (``[MSE(), AuxK()]``); the crosscoder is left in ``eval()``.

    ``batches``: raw [batch, model, d_in] tensors, read again from the start when they end.  The same crosscoder, batches and number
    of threads give the same bytes.  Each batch goes to the weights' device.  The first Ctrl-C or SIGTERM finishes the step and
    returns with ``interrupted``, the second acts at once.

    ``checkpoints``: a folder that gets one every ``checkpoint_every`` steps, at the end and where a signal stops the training; a
    finished training's checkpoints there are replaced, an unfinished one's are not (FileExistsError).
    ``resume``: such a folder; the newest whole checkpoint there is gone on from, with the same bytes at the end as if nothing had
    happened, and the next ones go there too.  The same crosscoder, batches, losses and settings must be passed as at the start.

    Raises TypeError for a store that is not shuffled and for checkpoints of batches that can be read only once, ValueError for k
    latents a token that are no whole number in every batch, InUse for a folder that another training saves into, before any work;
    EmptyData where the batches end early, NonFiniteActs for NaN or Inf activations, FloatingPointError for a loss or gradient that
    is not finite: the weights are then those of the step before, and ``checkpoints/crashed`` has what it takes to take the step
    again (:func:`tl_crosscoder.training.crash.reproduce`).  NotSaved where a checkpoint cannot be written; the one before it
    is whole.
    """
    config = TrainConfig() if config is None else config
    losses = [MSE(), AuxK()] if losses is None else list(losses)
    _check_names(losses)
    refuse_store(batches, crosscoder)
    refuse_fractions(batches, crosscoder.sparsity)
    check(crosscoder, losses)
    agree(crosscoder)
    optimizer = Adam(crosscoder, halved=config.moments == "bfloat16", kernels=config.kernels)
    device, shard = crosscoder.W_dec.device, crosscoder.shard
    feed, firing = Feed(batches, config.steps), FiringRecord(len(crosscoder.W_dec), device, shard)
    state = TrainingState(crosscoder, optimizer, feed, firing, History(notes=feed.notes()), Window(shard))
    keeper, history = Keeper(state, losses, config, checkpoints, resume), state.history
    logging = sinks(config, history) if shard.is_first else nullcontext([])
    with keeper, logging as logs, graceful_interrupt() as interrupt, training(crosscoder):
        crosscoder.partition.check_again(crosscoder.W_enc_rows, crosscoder.W_dec)
        for step, batch in enumerate(keeper.read(), feed.step):
            x = shard.read(batch).to(device, non_blocking=True)
            if step == 0:
                start_bias(crosscoder, batch.to(device), config)
            with keeper.watching(batch):
                out, terms = take_step(state, losses, config, x, step)
            firing.update(out.codes)
            state.window.add(out, terms)
            state.tokens += len(batch)
            done, history.stopped_by = step + 1, interrupt.among(shard)
            if done % config.log_every == 0 or done == config.steps:
                log_row(state, losses, config, logs)
            if done % config.checkpoint_every == 0 or done == config.steps or history.interrupted:
                keeper.save()
            if history.interrupted:
                if state.window.steps:  # after the save: a training that goes on has no such row
                    log_row(state, losses, config, logs)
                history.notes.append(keeper.farewell())
                for log in logs:
                    log.note(history.notes[-1])
                break
    return history


def take_step(
    state: TrainingState, losses: Sequence[Loss], config: TrainConfig, x: Tensor, step: int
) -> tuple[CrosscoderOutput, dict[str, Tensor]]:
    """One step down the losses on a batch: what the crosscoder made of it before, and each loss."""
    crosscoder = state.crosscoder
    crosscoder.sparsity.advance(step, config.steps)
    progress = Progress(step, config.steps, state.tokens, state.firing.tokens_since_fired)
    # notebooks switch gradients off; reading the batches stays as it was
    with torch.enable_grad(), summed_by(state.optimizer.kernels.bag):
        out = crosscoder(x)
        terms = {loss.name: loss(x, out, crosscoder, progress) for loss in losses}
        state.optimizer.descend(terms, lr=config.lr_at(step), clip=config.clip, step=step)
    return out, terms


@contextmanager
def training(crosscoder: Crosscoder) -> Iterator[None]:
    """In ``train()`` within the block, in ``eval()`` after it, whatever happened."""
    crosscoder.train()
    try:
        yield
    finally:
        crosscoder.eval()


def log_row(state: TrainingState, losses: Sequence[Loss], config: TrainConfig, logs: Sequence[Sink]) -> None:
    """Close the window: its row goes to the history and to the logs."""
    row = {"step": state.feed.step, "tokens": state.tokens, "lr": config.lr_at(state.feed.step - 1)}
    row |= state.window.row()
    row |= {
        "k": state.crosscoder.sparsity.k_now,
        "dead_fraction": state.firing.dead_fraction(_dead_after(losses)),
    }
    state.history.rows.append(row)
    for log in logs:
        log.row(row)
    state.window = Window(state.crosscoder.shard)


@torch.no_grad()
def start_bias(crosscoder: Crosscoder, x: Tensor, config: TrainConfig) -> None:
    """Put an untrained ``b_dec`` where the first batch is."""
    wanted = config.b_dec_init == "geometric_median" and crosscoder.b_dec.requires_grad
    if wanted and not crosscoder.b_dec.any():
        crosscoder.b_dec.copy_(geometric_median(crosscoder.normalised(x, "train")))


def _check_names(losses: Sequence[Loss]) -> None:
    names = [loss.name for loss in losses]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"want at least one loss and each name once, got {names}")


def _dead_after(losses: Sequence[Loss]) -> int:
    """The tokens of silence that the losses call dead."""
    return next((n for loss in losses if (n := getattr(loss, "dead_after_tokens", None))), 10_000_000)
