"""cogvx evaluate: measure an embedded checkpoint on Shapes World."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ._arguments import CHOICES


def main(
    model: str = "tiny",
    num_prompts: int = 480,
    num_clips: int = 96,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    seed: int = 0,
    numerics: Annotated[str, CHOICES] = "sat",
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
) -> None:
    """Generate from prompts, half of them of combinations never trained on, judge the clips, and measure the VAE.

    Args:
        model: a checkpoint trained on Shapes World; one that takes images is given first frames beside the prompts.
        num_prompts: how many videos to generate and judge.
        num_clips: how many rendered clips the VAE encodes and decodes.
        num_inference_steps: of the sampler.
        guidance_scale: how closely the prompts are followed.
        seed: prompt i is made with seed + i.
        numerics: whose arithmetic to follow, and changes to it, as in sat,null_text=encoded.
        output: a folder for the table and the figures as JSON.
    """
    from ..eval.report import evaluate

    sampling = num_inference_steps, output, guidance_scale
    print(evaluate(model, num_prompts, num_clips, seed, *sampling, numerics=numerics))
