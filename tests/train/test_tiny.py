"""The recipe of the embedded checkpoints, from its first stage to its last, in a step of each."""

import shutil
from dataclasses import replace

import pytest
import torch

from cogvx import Pipeline
from cogvx.models.checkpoint import load_tensors
from cogvx.train.options import TrainingError
from cogvx.train.tiny import TinyTraining, leave_out_shared, train


def weights(folder):
    return load_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors")[0]


def same(some, others):
    return {name for name, weight in some.items() if torch.equal(weight, others[name])}


@pytest.mark.slow
def test_every_stage_hands_its_checkpoint_on(tmp_path):
    run = TinyTraining(tmp_path, num_clips=64, num_clips_i2v=64, share=2e-4, embed=False)
    train(run)
    first, tiny, with_image = (weights(tmp_path / name) for name in ("first", "tiny", "tiny-i2v"))
    feed_forward = {name for name in first if ".ff." in name}
    assert feed_forward <= same(first, tiny) and feed_forward <= same(first, with_image)
    moved = {name for name in first if ".attn1.to_" in name and name.endswith("weight")}
    assert moved and not moved & (same(first, tiny) | same(first, with_image) | same(tiny, with_image))
    for name, how in (("tiny", {}), ("tiny-i2v", {"image": torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()})):
        clip = Pipeline.from_pretrained(tmp_path / name, device="cpu")(
            "a red circle", num_inference_steps=2, seed=0, **how
        )
        assert clip.frames.shape == (17, 64, 64, 3)

    packaged = shutil.copytree(tmp_path / "tiny-i2v", tmp_path / "packaged")
    leave_out_shared(packaged, tmp_path / "tiny")
    assert weights(packaged).keys() == with_image.keys() - same(with_image, tiny)
    assert {path.name for path in packaged.iterdir()} == {"model_index.json", "scheduler", "transformer"}

    train(run)  # nothing is left to do
    assert len(same(weights(tmp_path / "tiny"), tiny)) == len(tiny)
    with pytest.raises(TrainingError, match="other options"):
        train(replace(run, seed=1))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"share": 1e-3}, "embed is True"),
        ({"share": 0.0, "embed": False}, "share is"),
        ({"num_clips": 100, "embed": False}, "num_clips is 100"),
        ({"num_clips": 64, "embed": False}, "num_clips_i2v is 1856"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=str,
)
def test_options_are_refused_before_anything_is_trained(options, names):
    with pytest.raises(TrainingError, match=names):
        TinyTraining(**options)
