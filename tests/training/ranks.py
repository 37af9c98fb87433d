"""Work on several processes, started as torchrun starts them, on one thread each."""

import os
import traceback
from multiprocessing import get_context

#: One process imports torch; the others are its forks and start at once.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.device_mesh", "tl_crosscoder.diffing.run", "tests.models.fake_pair"]
)


def on_processes(work, size, *arguments, timeout=60):
    """What ``work(*arguments)`` returns on each rank; RuntimeError with the tracebacks where it fails."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at any free port
    pipes, processes = [], []
    for rank in range(size):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_rank, args=(work, rank, size, store.port, arguments, there), daemon=True
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    told = [_heard(rank, pipe, timeout) for rank, pipe in enumerate(pipes)]
    for process in processes:
        process.join(5)
        process.kill()
    if failures := [text for kind, text in told if kind == "failed"]:
        raise RuntimeError("\n".join(failures))
    return [result for _, result in told]


def _heard(rank, pipe, timeout):
    try:
        return pipe.recv() if pipe.poll(timeout) else ("failed", f"rank {rank}: no answer")
    except EOFError:
        return "failed", f"rank {rank}: it died"


def _rank(work, rank, size, port, arguments, pipe):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ |= {
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(("done", work(*arguments)))
    except BaseException:
        pipe.send(("failed", f"rank {rank}: {traceback.format_exc()}"))
