# ruff: noqa: T201  (it answers by printing)
"""A process of its own that imports torch once and forks children, which train and are killed, limited or interrupted.

It reads one JSON request a line, ``{"do": name, ...}``, and answers with one.  Importing takes seconds and a forked child starts at
once, so a test can afford hundreds of deaths.
"""

import hashlib
import json
import os
import random
import resource
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # what an optimiser imports when it is made
from torch.utils.data import DataLoader, Dataset

import tl_crosscoder.diffing.run  # noqa: F401  (what the command line imports when it runs)
from tests.models.fake_pair import FakePair, byte_tokenizer
from tl_crosscoder import cli
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.losses import MSE, AuxK
from tl_crosscoder.dictionary.sparsity import BatchTopK
from tl_crosscoder.hub.save import save
from tl_crosscoder.models.capture import capture
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.training import checkpoint, keeper, train

torch.set_num_threads(1)
STEPS = 60
PAIR = FakePair(byte_tokenizer(), d_in=8)
TEXTS = [f"document {i} says something about the number {i * 7}" for i in range(60)]


def batches(kind):
    """A store's own shuffled batches, or a list."""
    if kind == "store":
        return capture(PAIR, Corpus.from_texts(TEXTS, PAIR.tokenizer), progress=False).shuffled(
            64, 0, buffer_rows=500
        )
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 2, 8, generator=generator) for _ in range(7)]


DATA = {kind: batches(kind) for kind in ("store", "list")}


def job(folder, kind, steps=STEPS, every=3, keep_last=2):
    """Train, going on from what is there; then the finished crosscoder is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    crosscoder = Crosscoder(8, 48, BatchTopK(3, k_max=6, k_anneal_steps=20))
    config = train.TrainConfig(
        steps=steps, lr=1e-2, log_every=4, checkpoint_every=every, keep_last=keep_last, progress=False,
        log_path=folder / "train.jsonl",
    )  # fmt: skip
    losses = [MSE(), AuxK(dead_after_tokens=500)]
    resume = checkpoints if list(checkpoints.glob("step-*")) else None
    train.train(crosscoder, DATA[kind], losses, config, checkpoints=checkpoints, resume=resume)
    save(crosscoder, folder / "crosscoder")


def digest(folder):
    """A hash of all that a finished training leaves, without its timings."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    about = json.loads((last / checkpoint.ABOUT).read_text())
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert rows == about["rows"]
    del about["state"]["window"]["seconds"], about["digest"]
    for row in about["rows"]:
        del row["tokens_per_second"]
    text = json.dumps(about).encode() + (folder / "crosscoder" / "model.safetensors").read_bytes()
    return hashlib.sha256(text).hexdigest()  # `about` has the hash of the checkpoint's tensors


def fork(work, *arguments, output):
    """The process id of a child that does the work; what it prints goes to a file."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = work(*arguments) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(folder, *arguments):
    """Run the job to its end; RuntimeError with its output if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    _, status = os.waitpid(fork(job, folder, *arguments, output=folder / "output.txt"), 0)
    if status:
        raise RuntimeError((folder / "output.txt").read_text())


def killed(folder, kind, kills, seed):
    """Trainings killed at random moments, again and again, until there were so many kills; each ends as one left alone."""
    folder, rng, begun = Path(folder), random.Random(seed), time.perf_counter()
    finish(folder / "whole", kind)
    whole, ends, done, in_save, longest = digest(folder / "whole"), [], 0, 0, 0.25
    while done < kills:
        here = folder / f"run {len(ends)}"
        here.mkdir()
        while True:
            pid = fork(job, here, kind, output=here / "output.txt")
            time.sleep(rng.uniform(0.0, longest))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                break
            done += 1
            checkpoints = here / "checkpoints"
            in_save += bool(list(checkpoints.glob(".step-*")))
            for visible in checkpoints.glob("step-*"):
                checkpoint.read(visible)
        if os.WEXITSTATUS(status):
            raise RuntimeError((here / "output.txt").read_text())
        ends.append(digest(here))
        if left := list((here / "checkpoints").glob(".*")):
            raise RuntimeError(f"left behind: {left}")
    same = sum(end == whole for end in ends)
    return {
        "kills": done,
        "runs": len(ends),
        "same": same,
        "in_save": in_save,
        "seconds": time.perf_counter() - begun,
    }


POINTS = [
    (os, "open"),
    (os, "mkdir"),
    (os, "fsync"),
    (os, "rename"),
    (os, "rmdir"),
    (os, "unlink"),
    (checkpoint, "save_file"),
]


def failing(folder, kind, stop):
    """The job, with the process gone just before the ``stop``-th system call of its saves; prints how many there were."""
    calls = 0

    def wrapped(call, name):
        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == stop:
                if name == "save_file":  # half of the file is there
                    call(*arguments, **options)
                    os.truncate(arguments[1], 1000)
                os._exit(9)
            return call(*arguments, **options)

        return counted

    for module, name in POINTS:
        setattr(module, name, wrapped(getattr(module, name), name))
    job(folder, kind, 9, 3, 1)
    print(calls)


def failpoints(folder, kind, stride):
    """A training that dies before every ``stride``-th system call of its saves in turn, then is taken up again."""
    folder = Path(folder)
    finish(folder / "whole", kind, 9, 3, 1)
    whole, output = digest(folder / "whole"), folder / "output.txt"
    os.waitpid(fork(failing, folder / "counted", kind, 0, output=output), 0)
    calls, same = int(output.read_text()), 0
    stops = range(1, calls + 1, stride)
    for stop in stops:
        here = folder / str(stop)
        _, status = os.waitpid(fork(failing, here, kind, stop, output=output), 0)
        if os.waitstatus_to_exitcode(status) != 9:
            raise RuntimeError(f"point {stop}: {output.read_text()}")
        finish(here, kind, 9, 3, 1)
        same += digest(here) == whole and not list((here / "checkpoints").glob(".*"))
    return {"points": len(stops), "same": same}


def full_disk(folder, kind):
    """Files may not grow over half of what a checkpoint needs: the error, and the checkpoint before it, byte by byte."""
    folder = Path(folder)
    finish(folder / "whole", kind)
    last = sorted((folder / "whole" / "checkpoints").glob("step-*"))[-1]
    room = (last / checkpoint.STATE).stat().st_size // 2
    here = folder / "here"

    def limited():
        write = keeper.write

        def write_limited(saved, directory, shard):
            if saved.step == 9:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            return write(saved, directory, shard)

        keeper.write = write_limited
        try:
            job(here, kind)
        except checkpoint.NotSaved as error:
            print(error)

    _, status = os.waitpid(fork(limited, output=folder / "output.txt"), 0)
    checkpoints = here / "checkpoints"
    left = sorted(path.name for path in checkpoints.iterdir())
    kept = [checkpoint.read(path).step for path in sorted(checkpoints.glob("step-*"))]
    finish(here, kind)
    error = (folder / "output.txt").read_text()
    return {
        "error": error,
        "status": status,
        "left": left,
        "kept": kept,
        "same": digest(here) == digest(folder / "whole"),
    }


class Deadly(Dataset):
    """Rows of which one kills the data worker that reads it."""

    def __init__(self, deadly=None):
        self.rows, self.deadly = torch.cat(DATA["list"]), deadly

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if i == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[i]


def dead_worker(folder):
    """A training whose data worker is killed in the fifth batch, then taken up again without one; and one left alone."""
    folder, output = Path(folder), Path(folder) / "output.txt"
    alone = DataLoader(Deadly(), batch_size=64)

    def run(here, data):
        torch.manual_seed(7)
        DATA["loader"] = data
        job(here, "loader", every=STEPS)

    def dying():
        try:
            run(
                folder / "here",
                DataLoader(Deadly(4 * 64 + 5), batch_size=64, num_workers=1, prefetch_factor=1),
            )
        except RuntimeError as error:
            print(json.dumps([str(error), *error.__notes__]))

    for work, *arguments in [(dying,), (run, folder / "whole", alone)]:
        os.waitpid(fork(work, *arguments, output=output.with_suffix(f".{work.__name__}")), 0)
    step = checkpoint.newest(folder / "here" / "checkpoints")[0].step
    os.waitpid(fork(run, folder / "here", alone, output=output), 0)
    error, note = json.loads(output.with_suffix(".dying").read_text())
    return {
        "error": error,
        "note": note,
        "step": step,
        "same": digest(folder / "here") == digest(folder / "whole"),
    }


def unwritable(folder):
    """What training says, as a user without rights, of a folder that belongs to someone else; it reads no batch."""
    folder = Path(folder)
    (folder / "locked").mkdir(parents=True)
    (folder / "locked").chmod(0o555)

    class Batches:
        def __iter__(self):
            raise AssertionError("a batch was read")

    def told():
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            train.train(
                Crosscoder(8, 48, BatchTopK(3)), Batches(), checkpoints=folder / "locked" / "checkpoints"
            )
        except ValueError as error:
            print(error)

    _, status = os.waitpid(fork(told, output=folder / "output.txt"), 0)
    return {"error": (folder / "output.txt").read_text(), "status": status}


def command(arguments, output, stuck_at=None):
    """The process id of a `tl-crosscoder` command; its training may get stuck in one step."""

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stuck_at is not None:
            advance = BatchTopK.advance

            def stuck(self, step, steps):
                if step == stuck_at:
                    Path(f"{output}.stuck").touch()
                    end = time.monotonic() + 60
                    while time.monotonic() < end:
                        time.sleep(0.01)
                advance(self, step, steps)

            BatchTopK.advance = stuck
        sys.argv = ["tl-crosscoder", *arguments]
        cli.main()

    return fork(work, output=output)


def wait_for(path, seconds=20):
    end = time.monotonic() + seconds
    while not (path.exists() and (path.stat().st_size or path.suffix == ".stuck")):
        if time.monotonic() > end:
            raise RuntimeError(f"{path} did not come")
        time.sleep(0.005)


def signals(folder, name):
    """`train` stopped by one signal and gone on with by the command it prints; then stopped by two signals in a step."""
    folder, number = Path(folder), getattr(signal, name)
    capture(PAIR, Corpus.from_texts(TEXTS, PAIR.tokenizer), folder / "acts", progress=False)

    def arguments(where):
        return ["train", str(folder / "acts"), "--out", str(folder / where / "crosscoder"), "--d-sae", "32", "--k", "3",
                "--steps", "120", "--batch-size", "64", "--checkpoint-every", "20", "--json"]  # fmt: skip

    def result(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    told = {"codes": [result(command(arguments("whole run"), folder / "whole.txt"))]}
    first = folder / "first.txt"
    pid = command(arguments("a run"), first)
    wait_for(folder / "a run" / "train.jsonl")
    os.kill(pid, number)
    begun = time.monotonic()
    told["codes"].append(result(pid))
    told |= {"seconds": time.monotonic() - begun, "said": first.read_text()}
    told["finished"] = (folder / "a run" / "crosscoder").exists()
    again = shlex.split(told["said"].strip().splitlines()[-1])
    told |= {"again": again[-1]}
    told["codes"].append(result(command(again[1:], folder / "again.txt")))
    told["same"] = digest(folder / "a run") == digest(folder / "whole run")
    told["printed"] = (folder / "again.txt").read_text()

    pid = command(arguments("stuck"), folder / "stuck.txt", stuck_at=50)
    wait_for(folder / "stuck.txt.stuck")
    os.kill(pid, number)
    time.sleep(0.2)
    told["alive_after_one"] = os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, number)
    begun = time.monotonic()
    told["stopped_at_once"] = result(pid)
    told["seconds_for_two"] = time.monotonic() - begun
    told["newest"] = checkpoint.newest(folder / "stuck" / "checkpoints")[0].step
    return told


def main():
    verbs = {
        verb.__name__: verb for verb in (killed, failpoints, full_disk, dead_worker, unwritable, signals)
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = verbs[request.pop("do")](**request)
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
