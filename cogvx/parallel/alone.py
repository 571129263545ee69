"""One process that makes a video alone: what a pipeline asks of the processes, where there are no others."""

from collections.abc import Iterator
from typing import Any

from ..data.video import check_writable, write_video
from ..diffusion.guidance import TOGETHER, Together
from ..inputs import Inputs
from ..settings import Settings
from ..speed import Speed


class Alone:
    """Agrees with itself, writes itself. `cogvx.parallel.processes.Processes` does so for several."""

    sides: Together = TOGETHER
    leads = True  # whether this process writes and speaks

    def device_for(self, device: str | None) -> str | None:
        """Where this process computes, of the device that is asked for."""
        return device

    def same(self, number: int) -> int:
        """A number that all processes have."""
        return number

    def check_speed(self, speed: Speed) -> None:
        """Raises for policies for time that processes cannot share."""

    def ways_for(self, asked: str, limits: Any) -> Any:
        """In which ways processes share a video with these limits."""

    def share(self, pipeline: Any, asked: Any, settings: Settings) -> None:
        """Split what a pipeline computes, for a video with these resolved settings."""

    def agree(self, batch: list[Settings], inputs: Inputs) -> None:
        """Before the work."""

    def check_writable(self, output: Any) -> None:
        """Raises VideoError where an mp4 cannot be written."""
        check_writable(output, ".mp4")

    def write(self, output: Any, parts: Iterator, fps: float, about: dict) -> None:
        """Write frames as they come."""
        write_video(output, parts, fps, about)

    def recorded(self) -> dict[str, dict]:
        """What a video carries of how it was shared."""
        return {}


ALONE = Alone()
