"""cogvx generate: make a video from a prompt."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ._arguments import DType

if TYPE_CHECKING:
    from ..models import ExpertTransformer


def main(
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")],
    output: Annotated[Path, arg(aliases=["-o"])],
    model: str = "tiny",
    image: Path | None = None,
    last_image: Path | None = None,
    video: Path | None = None,
    mask: Path | None = None,
    strength: float = 0.8,
    negative_prompt: str = "",
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: Annotated[str, arg(metavar="SCALE[,SCALE...]")] = "6.0",
    dynamic_guidance: Literal["constant", "wave", "cosine"] | None = None,
    sampler: Literal["ddim", "dpmpp_2m_sde", "dpmpp_2m", "unipc"] | None = None,
    seed: int | None = None,
    ofs: float | None = None,
    longer: Literal["windows", "riflex"] | None = None,
    numerics: Annotated[str, arg(metavar="{sat,diffusers}[,FIELD=CHOICE...]")] = "sat",
    dtype: DType | None = None,
    device: str | None = None,
    progress: bool = True,
    transformer: Path | None = None,
    vae: Path | None = None,
    lora: tuple[Path, ...] = (),
    lora_weight: tuple[float, ...] = (),
) -> None:
    """Make a video from a prompt; also from a video and, with a model that takes them, from images.

    Args:
        prompt: what the video shows.
        output: the mp4 to write.
        model: a checkpoint folder, a hub name, or "tiny", the checkpoint inside the package.
        image: the first frame, for a model that takes images; scaled to cover the video and cut around the centre.
        last_image: the last frame, likewise.
        video: what to start from, instead of noise alone; as many of its frames are taken as are made.
        mask: an image for all frames or a video, white where the video is made anew; other pixels stay as they are.
        strength: how far the video goes back towards noise first, from above 0 to 1, all the way.
        negative_prompt: what it should not show.
        num_frames: 8N+1; unset, what the checkpoint was trained on, as for height and width.
        height: in pixels.
        width: in pixels.
        num_inference_steps: from 1 to 1000.
        guidance_scale: how closely the prompt is followed; up to 1 is no guidance; or one for each step, as in 6,6,4,1.
        dynamic_guidance: a scale that changes over the steps: "wave" as it was released, "cosine" as it was meant;
            unset, what the numerics say.
        sampler: unset, what the numerics and the checkpoint say.
        seed: unset, a fresh one, which the file keeps.
        ofs: of CogVideoX 1.5's image to video; unset, the 2.0 of training.
        longer: allows more frames than trained, which the model sees in overlapping windows, or all at once with its
            positions in time stretched as in RIFLEx.
        numerics: whose arithmetic to follow, and changes to it, as in sat,null_text=encoded.
        dtype: unset, the stored one (fp16 is computed in fp32 on a CPU).
        device: unset, a GPU where there is one.
        progress: show a progress bar.
        transformer: a safetensors or GGUF file in the place of the model's.
        vae: a safetensors file in the place of the model's.
        lora: files of LoRAs, in the naming of diffusers, SAT, Kohya or CogVideoX-Fun.
        lora_weight: how much each of them counts; unset, 1.
    """
    from ..data.video import check_writable
    from ..inputs import Inputs, planned
    from ..numerics import read_numerics
    from ..settings import Settings, read_configs
    from ._arguments import read_scales

    choices = read_numerics(numerics)
    settings = Settings(
        prompt, negative_prompt, num_frames, height, width, num_inference_steps, read_scales(guidance_scale),
        dynamic_guidance, sampler, seed, strength, ofs, longer,
    )  # fmt: skip
    files = {"image": image, "last_image": last_image, "video": video, "mask": mask}
    settings, _ = planned(settings, Inputs.read(**files), read_configs(model), choices)
    check_writable(output, ".mp4")

    from ..pipeline import Pipeline
    from ._arguments import torch_dtype

    pipeline = Pipeline.from_pretrained(model, torch_dtype(dtype), device, choices, transformer, vae)
    load_loras(pipeline.transformer, lora, lora_weight)
    clip = pipeline(**settings.as_dict(), **files, progress=progress)
    clip.save(output)
    print(f"{output}  ({clip.seconds:.1f} s, seed {clip.metadata['seed']})")


def load_loras(transformer: "ExpertTransformer", files: tuple[Path, ...], weights: tuple[float, ...]) -> None:
    from ..models.lora import load_lora
    from ..settings import SettingsError

    if len(weights) not in (0, len(files)):
        raise SettingsError(f"lora_weight has {len(weights)} numbers for {len(files)} LoRAs; give one for each")
    for file, weight in zip(files, weights or [1.0] * len(files), strict=True):
        try:
            load_lora(transformer, file, weight)
        except ValueError as error:
            raise SettingsError(str(error)) from error
