"""The processes that make one video, from within one of them: `torchrun --nproc-per-node 4 ...` starts them.

    with joined() as processes:
        pipeline = Pipeline.from_pretrained("zai-org/CogVideoX-5b", device=processes.device)
        processes.share(pipeline, "auto", settings)
        pipeline.write("a.mp4", "a panda plays a guitar", seed=1)  # in every process; process 0 writes

All of them load all weights and make all steps of the sampler, on the same latents; what the transformer and the VAE
compute is split. So each must be asked for the same video, the seed included.
"""

import hashlib
import signal
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..data.video import check_writable, write_video
from ..diffusion.guidance import TOGETHER
from ..inputs import Inputs
from ..machine import own_device
from ..settings import Settings
from ..speed import Speed
from .alone import ALONE, Alone
from .frames import DealtChunks
from .links import Link, ParallelError
from .rows import SplitRows
from .sides import Apart
from .tokens import SplitSequence
from .watch import Watch
from .ways import Limits, Ways, choose_ways

TO_MEET = timedelta(seconds=60)  # for all processes to be there
TO_ANSWER = timedelta(minutes=30)  # of a collective between living processes; the watch sees those that end


class Processes(Alone):
    """What a pipeline asks those who make a video together."""

    def __init__(self, device: torch.device, watch: Watch):
        self.device, self.watch, self.sent = device, watch, Counter()
        self.talk = Link(dist.group.WORLD, explain=watch.explain)  # what is not counted: a few bytes before the work
        self.ways: Ways | None = None

    @property
    def rank(self) -> int:
        return self.talk.rank

    @property
    def size(self) -> int:
        return self.talk.size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device_for(self, device: str | None) -> str:
        return str(self.device)

    def same(self, number: int) -> int:
        """The number that process 0 has."""
        return int(self.talk.shared("number", torch.tensor([number], device=self.device), 0))

    def meet(self) -> None:
        """Wait until every process is here."""
        self.talk.gathered("here", torch.zeros(1, device=self.device), [1] * self.size, dim=0)

    def check_speed(self, speed: Speed) -> None:
        """Raises ParallelError for policies for time: each process would decide for itself what it leaves out."""
        if speed != Speed():
            raise ParallelError(f"speed is {speed}; several processes take no policies for time, leave them out")

    def ways_for(self, asked: str, limits: Limits) -> Ways:
        """Raises ParallelError for ways that do not fit so many processes, or this video."""
        return choose_ways(asked, self.size, limits)

    def share(self, pipeline: Any, asked: str | Ways, settings: Settings) -> None:
        """Split what a `Pipeline` computes over the processes, for videos as these resolved settings say.

        Raises ParallelError for ways that do not fit them, SettingsError for settings that are not complete.
        """
        if pipeline.processes is not ALONE:
            raise ParallelError("the pipeline is shared already; load another one for other ways")
        self.check_speed(pipeline.speed)
        plan = None if pipeline.placed is None else pipeline.placed.plan.as_dict()
        loras = [(lora.sha256, lora.weight) for lora in pipeline.transformer.loras.values()]
        dtypes = pipeline.dtype, next(pipeline.vae.parameters()).dtype
        own = {
            "memory's plans": plan,
            "LoRAs": loras,
            "dtypes": dtypes,
            "numerics": pipeline.numerics,
            "ways": str(asked),
        }
        if differing := self.differing(own):
            raise ParallelError(f"{differing} differ between the processes; give memory as an amount, and all alike")
        tiled = pipeline.vae.tiling is not None
        limits = Limits.of(pipeline.configs, settings, pipeline.numerics, tiled)
        ways = self.ways_for(str(asked), limits)
        link = partial(Link, sent=self.sent, explain=self.watch.explain)
        shape = ways.guidance, ways.tokens, ways.heads
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("guidance", "tokens", "heads"))
        self.sides = Apart(link(mesh.get_group("guidance"))) if ways.guidance > 1 else TOGETHER
        if ways.tokens * ways.heads > 1:
            row, column = link(mesh.get_group("heads")), link(mesh.get_group("tokens"))
            SplitSequence(row, column).share(pipeline.transformer)
        if ways.frames > 1:
            pipeline.vae.tiling = DealtChunks(link(dist.group.WORLD), link(dist.new_group()), ways.frames)
        if ways.rows > 1:
            pipeline.vae.tiling = SplitRows(link(dist.group.WORLD))
        self.ways, self.limits_of = ways, partial(Limits.of, pipeline.configs, numerics=pipeline.numerics, tiled=tiled)
        pipeline.processes = self

    def differing(self, own: dict[str, Any]) -> str:
        """The names of what is not the same in every process."""
        digests = [list(hashlib.sha256(repr(value).encode()).digest()[:8]) for value in own.values()]
        mine = torch.tensor([digests], dtype=torch.uint8, device=self.device)
        all_equal = (self.talk.gathered("digests", mine, [1] * self.size, dim=0) == mine).all(dim=2).all(dim=0)
        return ", ".join(name for name, equal in zip(own, all_equal.tolist(), strict=True) if not equal)

    def agree(self, batch: list[Settings], inputs: Inputs) -> None:
        """Raises ParallelError where the processes are asked for different videos, or for one they cannot share."""
        asked = {name: [getattr(s, name) for s in batch] for name in batch[0].as_dict()} | {"inputs": inputs.hashes}
        if differing := self.differing(asked):
            what = f"{differing} differ between the processes"
            raise ParallelError(f"{what}; every one must be asked for the same video, with the same seed")
        choose_ways(str(self.ways), self.size, self.limits_of(batch[0]))

    def check_writable(self, output: Any) -> None:
        if self.leads:
            check_writable(output, ".mp4")

    def write(self, output: Any, parts: Iterator, fps: float, about: dict) -> None:
        """Write a video in process 0; all others wait for the end of it."""
        if self.leads:
            write_video(output, parts, fps, about)
        else:
            deque(parts, 0)
        self.same(0)

    def recorded(self) -> dict[str, dict]:
        return {} if self.ways == Ways() else {"parallel": self.ways.as_dict()}


@contextmanager
def together(asked: str | None, device: str | None = None) -> Iterator[Alone]:
    """The processes that torchrun has started, or this one alone where it has not and none are asked for."""
    if asked is None and not are_started():
        yield ALONE
        return
    with joined(device) as processes:
        yield processes


@contextmanager
def joined(device: str | torch.device | None = None) -> Iterator[Processes]:
    """This process among those that torchrun, or whatever sets its variables, has started.

    device: None takes a GPU where there is one, that of this process's number on its machine.

    Raises ParallelError where nothing has started processes, or where they do not find each other; SettingsError for a
    device that is not there. Where a process ends, all others raise ParallelError within 30 s, or are ended.
    """
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TO_MEET))
    except (ValueError, RuntimeError) as error:
        what = "start several processes with torchrun --nproc-per-node N -m cogvx ..., or leave parallel out"
        raise ParallelError(f"there are no other processes to work with ({error}); {what}") from error
    picked = own_device(device)
    watch = Watch(store.clone(), rank, size)
    watch.meet(TO_MEET)
    watch.start()
    store.set_timeout(TO_ANSWER)  # NCCL makes a group's links when the group first sends, however late one comes to it
    before = signal.signal(signal.SIGTERM, partial(told_to_stop, rank))
    try:
        dist.init_process_group(
            "nccl" if picked.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=TO_ANSWER
        )
        processes = Processes(picked, watch)
        yield processes
        processes.meet()
    except BaseException as error:
        watch.leave(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    watch.leave()
    dist.destroy_process_group()


def told_to_stop(rank: int, *_: object) -> None:
    """What torchrun asks of the others where one process has ended: a file that is being written is to go."""
    raise ParallelError(f"process {rank} was told to stop, most likely since another one has ended; nothing was made")


def are_started() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def refuse_torchrun(what: str) -> None:
    """Raises ParallelError where several processes would all do `what`, and write the same file."""
    if are_started():
        instead = "start it without torchrun; cogvx generate and cogvx train transformer or lora share their work"
        raise ParallelError(f"{what} works in one process, and torchrun has started this one; {instead}")
