"""One process at a time, and no lock outlives its process."""

import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from tl_crosscoder import lock
from tl_crosscoder.errors import InUse
from tl_crosscoder.lock import NAME, alone_in

CONTEXT = multiprocessing.get_context("forkserver")


def stay(folder, pipe, forks=False):
    with alone_in(folder):
        if forks and not os.fork():  # as a data worker that outlives its parent
            time.sleep(30)
            os._exit(0)
        pipe.send(os.getpid())
        time.sleep(30)


def staying(folder, **options):
    """A process that is in the folder."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=stay, args=(folder, there), kwargs=options, daemon=True)
    process.start()
    assert here.poll(10)
    return process, here.recv()


def test_a_second_process_is_told_of_the_first(tmp_path):
    process, pid = staying(tmp_path)
    try:
        with pytest.raises(InUse, match=rf"is being written to by process {pid} on .*choose another folder"):
            alone_in(tmp_path).__enter__()
    finally:
        process.kill()
        process.join()


def test_a_killed_process_keeps_nobody_out_nor_do_its_children(tmp_path):
    process, _ = staying(tmp_path, forks=True)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / NAME).exists()
    with alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_two_threads_at_once_one_is_let_in(tmp_path, monkeypatch):
    plain = lock._locked

    def slow(path):
        handle = plain(path)
        time.sleep(0.05)  # long enough for the other to look
        return handle

    monkeypatch.setattr(lock, "_locked", slow)
    inside, both = [], threading.Barrier(2)

    def enter():
        both.wait()
        with suppress(InUse), alone_in(tmp_path):
            inside.append(threading.current_thread())
            time.sleep(0.2)

    threads = [threading.Thread(target=enter) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1


def test_one_process_is_not_let_in_twice(tmp_path):
    with alone_in(tmp_path):
        for _ in range(2):
            with pytest.raises(InUse, match="this one"), alone_in(tmp_path / ".." / tmp_path.name):
                pass
    with alone_in(tmp_path):
        pass


def race(folder, rounds):
    """Each takes the folder again and again; whoever is in it adds a file, which must then be the only one."""
    done = 0
    while done < rounds:
        try:
            with alone_in(folder):
                mine = folder / str(os.getpid())
                mine.touch()
                if sorted(path.name for path in folder.iterdir()) != sorted([NAME, mine.name]):
                    os._exit(1)
                mine.unlink()
                done += 1
        except InUse:
            time.sleep(0)


def test_in_hundreds_of_races_never_two_are_in(tmp_path):
    processes = [CONTEXT.Process(target=race, args=(tmp_path, 50), daemon=True) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 8
