"""A plan: what lies in the device's memory when, and what is done in pieces."""

from dataclasses import asdict, dataclass, fields
from typing import Self

from ..models.eight_bits import FORMS
from ..models.tiling import Tiling

PLACES = ("resident", "visiting", "streamed")
SINCE = {"weights": None}  # what older videos do not say of their plan, and how those were made


class PlanError(ValueError):
    """A plan or a budget that cannot work; the message names the argument, its value and what is valid."""


@dataclass(frozen=True)
class Plan:
    """What to do without, for less memory on the device; as it stands, nothing.

    Weights are "resident" on the device; or they wait on the host and are "visiting" the device while their part works,
    or are "streamed" block by block, the next block on its way while one computes. None of it changes a bit of the
    result, nor do halos on the host. Guidance one clip after another does within rounding; what a tiling changes,
    `cogvx.models.tiling` says, and what weights in 8 bits do, `cogvx.models.eight_bits`.

    Raises PlanError for a place that there is not, and for such weights.
    """

    text_encoder: str = "resident"
    transformer: str = "resident"
    vae: str = "resident"  # or visiting; it has no blocks that are alike
    sequential_guidance: bool = False
    halos_on_host: bool = False  # those of the VAE's convolutions
    tiling: Tiling | None = None
    weights: str | None = None  # "int8" or "fp8": those of the blocks of the text encoder and the transformer

    def __post_init__(self) -> None:
        check_weights(self.weights)
        for name in ("text_encoder", "transformer", "vae"):
            place, valid = getattr(self, name), PLACES[:2] if name == "vae" else PLACES
            if place not in valid:
                raise PlanError(f"{name} of a plan is {place!r}; valid: {', '.join(map(repr, valid))}")

    def rounds_otherwise(self, guided: bool, batch_size: int) -> bool:
        """Whether the result may differ from that of a plan that does without nothing."""
        changed = self.tiling is not None or self.weights is not None
        return changed or (self.sequential_guidance and (guided or batch_size > 1))

    def as_dict(self) -> dict:
        """For JSON; `Plan.read` takes it."""
        return asdict(self)

    @classmethod
    def read(cls, record: dict) -> Self:
        """A plan from what a file says. Raises PlanError or TilingError for what is none."""
        names = [f.name for f in fields(cls)]
        record = SINCE | record if isinstance(record, dict) else record
        tiling = record.get("tiling") if isinstance(record, dict) else None
        if not isinstance(record, dict) or set(record) != set(names):
            raise PlanError(f"plan is {str(record)[:60]!r}; it must be a table of {', '.join(names)}")
        if tiling is not None and (not isinstance(tiling, dict) or set(tiling) != {f.name for f in fields(Tiling)}):
            raise PlanError(f"tiling of a plan is {str(tiling)[:60]!r}; it must be a table of a Tiling's fields")
        for name in ("sequential_guidance", "halos_on_host"):
            if not isinstance(record[name], bool):
                raise PlanError(f"{name} of a plan is {str(record[name])[:60]!r}; it must be true or false")
        return cls(**{**record, "tiling": None if tiling is None else Tiling(**tiling)})

    def __str__(self) -> str:
        parts = [f"{name.replace('_', ' ')} {getattr(self, name)}" for name in ("text_encoder", "transformer", "vae")]
        parts += ["guidance one after another"] if self.sequential_guidance else []
        parts += ["halos on the host"] if self.halos_on_host and self.tiling is None else []
        if (t := self.tiling) is not None:
            overlap = f", overlap {t.overlap}" if t.overlap else ""
            parts.append(f"VAE in {t.kind} tiles of at most {t.height} x {t.width}{overlap}")
        parts += [f"weights in {self.weights}"] if self.weights else []
        return "; ".join(parts)


def check_weights(form: object) -> None:
    """Raises PlanError for weights in a form that there is not."""
    if form is not None and form not in FORMS:
        raise PlanError(f"weights is {str(form)[:60]!r}; valid: None, {', '.join(map(repr, FORMS))}")
