"""A run's log: a JSON object a line and step, which a run that goes on continues where its state was saved."""

import json
import math
from pathlib import Path

from ..models.on_disk import replacing


class Log:
    """`log.write({"step": 1, "loss": 0.5})`; opened for a run that stands at `step`, it forgets what came later.

    A number that is not finite is null, since JSON has none such.

    tensorboard: the same numbers as scalars for TensorBoard, in the folder `tensorboard` beside the file. Without a
    file nothing is written.
    """

    def __init__(self, file: Path | None, step: int, tensorboard: bool = False):
        self._file = self._board = None
        if file is None:
            return
        kept = []
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # the process was killed while it wrote this line
                continue
        with replacing(file) as partial:
            partial.write_text("".join(kept))
        self._file = file.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # only now: tensorboard is no requirement

            self._board = SummaryWriter(str(file.parent / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict) -> None:
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # as JSON is
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name in row.keys() - {"step"}:
                self._board.add_scalar(name, row[name], row["step"])

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        for opened in (self._file, self._board):
            if opened is not None:
                opened.close()
