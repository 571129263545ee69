"""What several commands take and make of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    import torch

    from ..models.vae import CausalVAE
    from ..numerics import Numerics as Choices
    from ..pipeline import Pipeline
    from ..settings import Settings
    from ..speed import Speed

DType = Literal["float32", "bfloat16", "float16"]
SCALES = arg(metavar="SCALE[,SCALE...]")
CHOICES = arg(metavar="{sat,diffusers}[,FIELD=CHOICE...]")


@dataclass(frozen=True)
class Sampling:
    """From noise to latents.

    Args:
        negative_prompt: what the video should not show.
        num_inference_steps: from 1 to 1000.
        guidance_scale: how closely the prompt is followed; up to 1 is no guidance; or one for each step, as in 6,6,4,1.
        dynamic_guidance: a scale that changes over the steps: "wave" as it was released, "cosine" as it was meant;
            unset, what the numerics say.
        sampler: unset, what the numerics and the checkpoint say.
        seed: unset, a fresh one, which the file keeps.
        ofs: of CogVideoX 1.5's image to video; unset, the 2.0 of training.
    """

    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: Annotated[str, SCALES] = "6.0"
    dynamic_guidance: Literal["constant", "wave", "cosine"] | None = None
    sampler: Literal["ddim", "dpmpp_2m_sde", "dpmpp_2m", "unipc"] | None = None
    seed: int | None = None
    ofs: float | None = None

    def settings(self) -> dict[str, Any]:
        """What a call takes. Raises SettingsError for a scale that is no number."""
        return vars(self) | {"guidance_scale": read_scales(self.guidance_scale)}


@dataclass(frozen=True)
class Loading:
    """The weights, and how they are computed with.

    Args:
        model: a checkpoint folder, a hub name, or one inside the package: "tiny", or "tiny-i2v" for images.
        transformer: a safetensors or GGUF file in the place of the model's.
        vae: a safetensors file in the place of the model's.
        lora: files of LoRAs, in the naming of diffusers, SAT, Kohya or CogVideoX-Fun.
        lora_weight: how much each of them counts; unset, 1.
        numerics: whose arithmetic to follow, and changes to it, as in sat,null_text=encoded.
        dtype: unset, the stored one (fp16 is computed in fp32 on a CPU).
        device: unset, a GPU where there is one.
        memory: what the device may hold, as in 8GB, or auto, what is free there; unset, all it takes. See cogvx plan.
        weights: those of the text encoder's and the transformer's blocks in 8 bits, for half the memory; unset, as
            stored, and in int8 where nothing else keeps to memory.
    """

    model: str = "tiny"
    transformer: Path | None = None
    vae: Path | None = None
    lora: tuple[Path, ...] = ()
    lora_weight: tuple[float, ...] = ()
    numerics: Annotated[str, CHOICES] = "sat"
    dtype: DType | None = None
    device: str | None = None
    memory: str | None = None
    weights: Literal["int8", "fp8"] | None = None

    def choices(self) -> "Choices":
        """The numerics field by field. Raises NumericsError for none."""
        from ..numerics import read_numerics

        return read_numerics(self.numerics)

    def pipeline(self, planned_for: "Settings | None" = None, speed: "Speed | None" = None) -> "Pipeline":
        """All weights; where memory is given, under a plan for a video of these settings, resolved.

        Raises SettingsError or CheckpointError for files that are none, or do not fit.
        """
        from ..pipeline import Pipeline
        from ..settings import SettingsError

        if speed is not None:
            speed.check_weights(self.weights)
        if len(self.lora_weight) not in (0, len(self.lora)):
            what = f"{len(self.lora_weight)} numbers for {len(self.lora)} LoRAs; give one for each"
            raise SettingsError(f"lora_weight has {what}")
        loras = list(zip(self.lora, self.lora_weight or [1.0] * len(self.lora), strict=True))
        return Pipeline.from_pretrained(
            self.model, torch_dtype(self.dtype), self.device, self.choices(), self.transformer, self.vae,
            self.memory, planned_for, self.weights, loras, speed,
        )  # fmt: skip


@dataclass(frozen=True)
class Policies:
    """What is given up for time; see docs/speed.md.

    Args:
        step_cache: how far what the transformer's blocks read may drift before they are computed again, relative to its
            size, as in 0.5; until then they are taken to add what they did last. Unset, every step is computed.
        attention: the scores of attention in 8 bits.
        compiled: pass the transformer's blocks through torch.compile.
        products: of tokens and weights in the transformer's blocks, in 8 bits.
    """

    step_cache: float | None = None
    attention: Literal["int8"] | None = None
    compiled: bool = False
    products: Literal["fp8"] | None = None

    def speed(self) -> "Speed":
        """Raises SettingsError for policies that are none."""
        from ..speed import Speed

        return Speed(**vars(self))


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype of that name; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)


def read_scales(text: str) -> float | list[float]:
    """A guidance scale, or one for each step, separated by commas."""
    from ..settings import SettingsError

    try:
        scales = [float(word) for word in text.split(",")]
    except ValueError:
        what = "a number, or one for each step with commas between them"
        raise SettingsError(f"guidance_scale is {text[:60]!r}; it must be {what}") from None
    return scales if len(scales) > 1 else scales[0]


def load_vae(model: str, device: str | None) -> "CausalVAE":
    """The VAE of a checkpoint, ready to compute on the device."""
    from ..machine import computable, pick_device
    from ..models.vae import CausalVAE

    return computable(CausalVAE.from_pretrained(model, device=pick_device(device)), None)


def check_is_another_file(output: Path, source: Path) -> None:
    """Raises VideoError where writing would replace what is read."""
    from ..data.video import VideoError

    if output.resolve() == source.resolve():
        raise VideoError(f"cannot write {output}: it is the file that is read; give another name")
