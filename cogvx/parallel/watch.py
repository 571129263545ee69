"""Says within seconds that a process of a group has ended, whatever the others wait for.

Every process marks in a store, second after second, that it lives; or why it stopped, or that it is done. A collective
that waits for a process that is gone fails at once on some backends and waits for many minutes on others: then the
watch ends the waiting process itself.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from ..data.video import remove_unfinished
from .links import ParallelError

EVERY = 1.0  # seconds between two marks
PATIENCE = 15.0  # seconds without a mark until a process counts as gone
GRACE = 5.0  # seconds that a process then has to end by itself
ALIVE, DONE = "alive", "done"


class Watch(threading.Thread):
    """Watches a group of processes from within one of them, from `start()` to `leave()`.

    store: an own connection to it.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, patience: float = PATIENCE):
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.size, self.patience = store, rank, size, patience
        self.marks = {other: ("", time.monotonic()) for other in range(size) if other != rank}
        self.lost: str | None = None
        self.left = threading.Event()
        store.set_timeout(timedelta(seconds=patience))
        store.set(f"watch/{rank}", ALIVE)

    def meet(self, patience: timedelta) -> None:
        """Wait until all processes have made their first mark. Raises ParallelError where some do not come."""
        try:
            self.store.wait([f"watch/{one}" for one in range(self.size)], patience)
        except RuntimeError as error:
            what = f"not all of the {self.size} processes came within {patience.seconds} s"
            raise ParallelError(f"{what} ({first_line(error)})") from error

    def run(self) -> None:
        count = 0
        while not self.left.wait(EVERY) and self.lost is None:
            count += 1
            try:
                self.store.set(f"watch/{self.rank}", f"{ALIVE} {count}")
                self.look()
            except RuntimeError as error:
                self.lost = f"what held the processes together has ended, most likely process 0 ({first_line(error)})"
        if self.lost is not None and not self.left.wait(GRACE):
            end_process(self.lost)

    def look(self) -> None:
        """Read the others' marks; `lost` then says what is wrong, if anything is."""
        now = time.monotonic()
        for other, (before, since) in self.marks.items():
            mark = self.store.get(f"watch/{other}").decode()
            if mark != before:
                self.marks[other] = mark, now
            if mark.startswith("stopped"):
                self.lost = f"process {other} of {self.size} {mark}"
            elif mark != DONE and mark == before and now - since > self.patience:
                self.lost = f"process {other} of {self.size} has ended or hangs: no sign of it for {now - since:.0f} s"

    def explain(self, error: RuntimeError) -> str:
        """Which process is gone, for a call that failed; waits a few seconds to find out."""
        began = time.monotonic()
        while self.lost is None and time.monotonic() - began < 4 * EVERY and not self.left.is_set():
            time.sleep(EVERY / 10)
        if self.lost is not None:
            return f"{self.lost}; nothing was made"
        now, marks = time.monotonic(), self.marks.items()
        silent = [str(other) for other, (mark, since) in marks if mark != DONE and now - since > 2.5 * EVERY]
        if silent:
            return f"process {', '.join(silent)} of {self.size} has ended or cannot be reached; nothing was made"
        return f"the processes cannot reach each other ({first_line(error)}); nothing was made"

    def leave(self, error: BaseException | None = None) -> None:
        """Stop watching, and let the others know why: an error of this process, or that it is done."""
        self.left.set()
        if self.is_alive():
            self.join()
        mark = DONE if error is None else f"stopped: {type(error).__name__}: {error}"[:500]
        with suppress(RuntimeError):  # nobody may be left to be told
            self.store.set(f"watch/{self.rank}", mark)
            if error is not None and self.rank == 0:
                time.sleep(2 * EVERY)  # with it the store may go, where the others must still read why


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def end_process(reason: str) -> None:
    """For a process that hangs in a collective: no exception can reach it there."""
    print(f"cogvx: error: {reason}; nothing was made", file=sys.stderr, flush=True)
    remove_unfinished()
    os._exit(2)
