"""A plan: what lies in the device's memory when, and what is done in pieces."""

from dataclasses import dataclass

from ..models.tiling import Tiling

PLACES = ("resident", "visiting", "streamed")


class PlanError(ValueError):
    """A plan or a budget that cannot work; the message names the argument, its value and what is valid."""


@dataclass(frozen=True)
class Plan:
    """What to do without, for less memory on the device; as it stands, nothing.

    Weights are "resident" on the device; or they wait on the host and are "visiting" the device while their part works,
    or are "streamed" block by block, the next block on its way while one computes. None of it changes a bit of the
    result, nor do halos on the host. Guidance one clip after another does within rounding; what a tiling changes,
    `cogvx.models.tiling` says.

    Raises PlanError for a place that there is not.
    """

    text_encoder: str = "resident"
    transformer: str = "resident"
    vae: str = "resident"  # or visiting; it has no blocks that are alike
    sequential_guidance: bool = False
    halos_on_host: bool = False  # those of the VAE's convolutions
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        for name in ("text_encoder", "transformer", "vae"):
            place, valid = getattr(self, name), PLACES[:2] if name == "vae" else PLACES
            if place not in valid:
                raise PlanError(f"{name} of a plan is {place!r}; valid: {', '.join(map(repr, valid))}")

    def __str__(self) -> str:
        parts = [f"{name.replace('_', ' ')} {getattr(self, name)}" for name in ("text_encoder", "transformer", "vae")]
        parts += ["guidance one after another"] if self.sequential_guidance else []
        parts += ["halos on the host"] if self.halos_on_host and self.tiling is None else []
        if (t := self.tiling) is not None:
            overlap = f", overlap {t.overlap}" if t.overlap else ""
            parts.append(f"VAE in {t.kind} tiles of at most {t.height} x {t.width}{overlap}")
        return "; ".join(parts)
