"""cogvx show: print how a video was made."""

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def main(file: Annotated[Positional[Path], arg(metavar="FILE")]) -> None:
    """Print the prompt, seed, settings, model hash and versions that a video carries, as JSON.

    Args:
        file: an mp4 that cogvx wrote.
    """
    from ..data.video import read_metadata

    print(json.dumps(read_metadata(file), indent=2, ensure_ascii=False))
