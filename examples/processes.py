"""Work in fresh processes, a few at a time, so that no piece of work sees what another left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

Notify = Callable[[float], None]


class Work(Protocol):
    """A piece of work that can travel to another process: it runs there and returns what travels back."""

    def __call__(self, notify: Notify) -> Any:
        """Do it, and call `notify(amount)` whenever some more of it is done."""


def cores() -> int:
    """How many processes run at the same time without taking turns."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_fresh_processes(
    pieces: Sequence[Work], *, workers: int, preload: Sequence[str], notify: Notify
) -> Iterator[tuple[int, Any]]:
    """Run each piece in a process of its own and yield its index and its result as it is done.

    The processes are forked from a server that has imported the modules of `preload` and done nothing else,
    so each starts from the same state, at once, whatever ran before it.

    Args:
        pieces: callables that can be pickled.
        workers: how many run at the same time.
        preload: names of modules that every piece imports.
        notify: called with the amounts that the pieces notify.

    Raises:
        RuntimeError: a process ended without a result; its traceback is on the screen.
    """
    forked = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload(list(preload))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # where the server looks for them
    waiting = list(enumerate(pieces))[::-1]
    running: dict[Any, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, piece = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(piece, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = index, process
            for receiver in wait(list(running)):
                kind, value = _receive(receiver)
                if kind == "progress":
                    notify(value)
                    continue
                index, process = running.pop(receiver)
                process.join()
                if kind == "ended":
                    raise RuntimeError(f"{pieces[index]}: its process ended (exit code {process.exitcode})")
                yield index, value
    finally:
        for _, process in running.values():
            process.terminate()


def _receive(receiver: Any) -> tuple[str, Any]:
    try:
        kind, value = receiver.recv()
    except EOFError:
        return "ended", None
    return kind, value


def _serve(piece: Work, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends this process
    sender.send(("result", piece(lambda amount: sender.send(("progress", amount)))))
