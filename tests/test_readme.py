"""What the README shows runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(example: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", example], cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]


def test_the_library_makes_videos(tmp_path):
    run(EXAMPLES[0], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["red.mp4", "square-0.mp4", "square-1.mp4"]


@pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if "cogvx_kernels" in example], ids=["block", "video"]
)
def test_the_kernels_stand_alone(tmp_path, example):
    run('import sys; sys.modules["cogvx"] = None  # importing it fails\n' + example, tmp_path)
