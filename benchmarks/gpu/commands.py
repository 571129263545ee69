"""Commands that may need too long."""

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def within(seconds: float, command: Sequence[str], **how: Any) -> tuple[int | None, str]:
    """A command's status and all that it wrote; None where its time was up, which ends whatever it has started too.

    how: more for `subprocess.Popen`, such as a file as `stdout`.
    """
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace", **how}
    process = subprocess.Popen(command, start_new_session=True, **how)
    try:
        said, _ = process.communicate(timeout=max(seconds, 1))
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
