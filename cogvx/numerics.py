"""Whose arithmetic to follow: a named choice for each place where the official code (SAT) and diffusers differ.

`SAT` is what the weights were trained and first sampled with, `DIFFUSERS` what most people run them with. A text names
either, and changes to it: `sat`, `diffusers`, `sat,null_text=encoded,rounding=rounded`.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


class NumericsError(ValueError):
    """A choice that there is not; the message names the field, its value and what is valid."""


def choice(sat: Any, diffusers: Any, meaning: str, *others: Any) -> Any:
    """A field of `Numerics`: what SAT does, what diffusers does, and what that means."""
    return field(metadata={"sat": sat, "diffusers": diffusers, "valid": (sat, diffusers, *others), "meaning": meaning})


@dataclass(frozen=True)
class Numerics:
    """A choice for every disagreement; `dataclasses.replace` changes one."""

    null_text: str = choice(
        "zeros", "encoded", "What stands for no text, in guidance: zeros, or the text encoder's answer to ''."
    )
    zero_snr: str = choice(
        "visited", "all",
        "The schedule's end is brought to zero SNR over the visited timesteps alone, the last of which keeps its "
        "alpha, and the velocity is read with the nearest training alpha; or over all timesteps of training.",
    )  # fmt: skip
    rounding: str = choice(
        "truncated", "rounded", "Timesteps where the step count does not divide their number (30: 965 or 966)."
    )
    moves: str = choice(
        "visited", "stride",
        "A step leads to the next visited timestep, the last one to the finished clip; or down by 1000 // steps, which "
        "may end at timestep 0.",
    )  # fmt: skip
    sampler: str = choice(
        "dpmpp_2m_sde", "folder", "The sampler when none is asked for: always this one, or what the folder names."
    )
    dynamic_guidance: str = choice(
        "wave", "constant", "The form of guidance over the steps when none is asked for.", "cosine"
    )
    latents_between_steps: str = choice(
        "fp32", "model", "The precision of latents between steps: fp32, or the model's."
    )
    last_norm_eps: float = choice(1e-6, 1e-5, "eps of the last modulated LayerNorm.")
    rope_positions: str = choice(
        "sliced", "rescaled",
        "3D RoPE at sizes other than the trained one: its table is sliced, or, in 1.0 models, its coordinates are "
        "rescaled to the trained grid.",
    )  # fmt: skip
    rope_dtype: str = choice(
        "model", "fp32",
        "The precision in which q and k are rotated: the model's, to which cosines, sines, products and sums are "
        "rounded, or fp32.",
    )  # fmt: skip
    sincos_table: str = choice(
        "sliced", "recomputed",
        "The positions that 2B and 5B-I2V add, at other sizes: a slice of the flat trained table, or computed anew, "
        "the learned ones of 5B-I2V by interpolation.",
    )  # fmt: skip
    text_tokens_1_5: int = choice(224, 226, "Text tokens of the 1.5 models.")
    image_latent_1_5: str = choice(
        "unscaled", "divided",
        "The image latent z of 1.5-5B-I2V: z, z / scaling_factor, or, as in its training code, z * scaling_factor.",
        "multiplied",
    )  # fmt: skip
    vae_encode_chunks: str = choice("whole", "8_frames", "A clip is encoded whole, or in chunks of 8 frames.")
    vae_decode_chunks: str = choice(
        "by_length", "pairs",
        "Latents are decoded in at most ten chunks, 41 as 5 and nine 4s, or as 3 and 2s (up to 21 both are the same).",
    )  # fmt: skip
    odd_latents: str = choice(
        "four_each", "first_alone",
        "An odd count of more than 13 latents is decoded to 4 frames a latent, of which a clip is the last 4k + 1; or "
        "to 4k + 1, the first latent to one frame.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for f in fields(self):
            value, valid = getattr(self, f.name), f.metadata["valid"]
            if value not in valid or isinstance(value, bool):
                raise NumericsError(f"{f.name} of numerics is {value!r}; valid: {', '.join(map(repr, valid))}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SAT = Numerics(**{f.name: f.metadata["sat"] for f in fields(Numerics)})
DIFFUSERS = Numerics(**{f.name: f.metadata["diffusers"] for f in fields(Numerics)})
PRESETS = {"sat": SAT, "diffusers": DIFFUSERS}


def read_numerics(value: "str | dict | Numerics") -> Numerics:
    """The choices that a preset's name, a name with changes, or the metadata of a video stand for.

    Raises: NumericsError, a ValueError, that names what is not known.
    """
    if isinstance(value, Numerics):
        return value
    if isinstance(value, dict):
        return _from_choices(value, None)
    name, *changes = value.split(",") if isinstance(value, str) else [value]
    if not isinstance(name, str) or name not in PRESETS:
        what = "sat, diffusers, or either with changes, as in sat,null_text=encoded"
        raise NumericsError(f"numerics is {str(value)[:60]!r}; valid: {what}")
    pairs = (change.partition("=") for change in changes)
    return _from_choices({key: _number_or_text(text) for key, _, text in pairs}, PRESETS[name])


def table() -> str:
    """The choices as a table in Markdown, one a line."""
    lines = ["| field | SAT | diffusers | what it is |", "|---|---|---|---|"]
    for f in fields(Numerics):
        others = "".join(f" Also valid: `{v}`." for v in f.metadata["valid"][2:])
        sat, diffusers, meaning = (f.metadata[key] for key in ("sat", "diffusers", "meaning"))
        lines.append(f"| `{f.name}` | `{sat}` | `{diffusers}` | {meaning}{others} |")
    return "\n".join(lines)


def _from_choices(choices: dict[str, Any], start: Numerics | None) -> Numerics:
    """Choices by name, all of them unless there is a start."""
    names = [f.name for f in fields(Numerics)]
    unknown = [str(key)[:60] for key in choices if key not in names]
    if unknown:
        raise NumericsError(f"numerics has no field {unknown[0]!r}; valid: {', '.join(names)}")
    missing = [name for name in names if start is None and name not in choices]
    if missing:
        raise NumericsError(f"numerics does not say {', '.join(missing)}")
    return replace(start, **choices) if start is not None else Numerics(**choices)


def _number_or_text(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
