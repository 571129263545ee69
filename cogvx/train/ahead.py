"""What the next steps of a run read, made by processes of its own while the model computes."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .options import TrainingError

Item = TypeVar("Item")


@contextmanager
def ahead(read: Callable[[int], Item], steps: range, workers: int) -> Iterator[Iterator[Item]]:
    """`read(step)` for every step, in order: `with ahead(read, range(3, 10), 2) as items: first = next(items)`.

    workers: the processes that call `read`, two steps each in advance; with 0 it is called here when its turn comes.
    They end with the block, and by themselves where this process is killed. `read` must depend on its step alone, and
    be picklable where processes are not forked.

    What `read` raises is raised here in its turn; TrainingError where a worker ended.
    """
    workers = min(workers, len(steps))
    if workers == 0:
        yield map(read, steps)
        return
    # A generator of its own: the loader draws a seed, which the process's own must not notice.
    loader = DataLoader(_Pickled(read, steps), batch_size=None, num_workers=workers, worker_init_fn=_begin,
                        generator=torch.Generator())  # fmt: skip
    items = iter(loader)
    try:
        yield _unpickled(items)
    except RuntimeError as ended:  # it comes at any time, in the midst of a step too
        if not str(ended).startswith("DataLoader worker"):
            raise
        reason = str(ended).split("\n")[0].rstrip(". ")
        raise TrainingError(f"{reason}; with workers=0 all is read by the run's own process") from ended
    finally:
        # It does so itself when nothing refers to it any more, but the traceback of an error may for long.
        items._shutdown_workers()


class _Pickled(Dataset):
    """What is read, or the error, as bytes: through a pipe, so that no shared memory and no open files run out."""

    def __init__(self, read: Callable[[int], object], steps: range):
        self.read, self.steps = read, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> bytes:
        try:
            return pickle.dumps((self.read(self.steps[i]), None))
        except (ValueError, OSError) as error:  # else the message would be that of a worker, with a traceback in it
            return pickle.dumps((None, error))


def _unpickled(items: Iterator[bytes]) -> Iterator:
    for pickled in items:
        item, error = pickle.loads(pickled)  # noqa: S301 - from a process of our own
        if error is not None:
            raise error
        yield item


def _begin(worker: int) -> None:
    """Leave SIGTERM and Ctrl-C, which may reach a whole group, to the one that saves the run's state; end with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """The loader's own watch takes whoever is the parent when it begins, which may be the one that adopts orphans."""
    parent = multiprocessing.parent_process()
    is_child = multiprocessing.get_start_method() != "forkserver"
    while parent.is_alive() and not (is_child and os.getppid() != parent.pid):
        time.sleep(1)
    os._exit(1)
