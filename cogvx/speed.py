"""What may be given up for time: each policy changes the video, so that none is on unless it is asked for."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from cogvx_kernels import int8_joint_attention

from .models.eight_bits import multiply_in_fp8
from .models.transformer import ExpertTransformer
from .settings import Settings, SettingsError

VALID = {"attention": ("int8",), "products": ("fp8",)}


@dataclass(frozen=True)
class Speed:
    """Policies for time, as it stands none. `benchmarks/policies.py` measures what each gains and costs.

    step_cache: how far what the blocks read may drift, relative to its size, before they are computed again; until
        then a step takes what they added in the last one. None computes every step.
    attention: "int8" computes attention's scores from queries and keys in 8 bits.
    compiled: the blocks pass through torch.compile; the first step of each size of video then takes long.
    products: "fp8" takes those of the fully connected layers in the blocks in 8 bits, tokens and weights.

    Raises SettingsError for what is none.
    """

    step_cache: float | None = None
    attention: str | None = None
    compiled: bool = False
    products: str | None = None

    def __post_init__(self) -> None:
        drift = self.step_cache
        number = isinstance(drift, int | float) and not isinstance(drift, bool)
        if drift is not None and not (number and math.isfinite(drift) and drift > 0):
            raise SettingsError(f"step_cache is {repr(drift)[:60]}; it must be a number above 0, or None")
        for name, valid in VALID.items():
            value = getattr(self, name)
            if value is not None and value not in valid:
                raise SettingsError(f"{name} is {repr(value)[:60]}; valid: None, {', '.join(map(repr, valid))}")
        if not isinstance(self.compiled, bool):
            raise SettingsError(f"compiled is {repr(self.compiled)[:60]}; it must be True or False")

    def prepare(self, transformer: ExpertTransformer, placed: Any = None) -> None:
        """Have a transformer compute so. placed: where a plan has its weights, a `cogvx.memory.placed.Placed`.

        Raises SettingsError where it moves them and blocks are to be compiled, and for products in fp8 of weights in
        int8.
        """
        if self.compiled and placed is not None and placed.plan.transformer != "resident":
            raise SettingsError("compiled is True, and memory has a plan that moves the transformer; leave one out")
        if self.products is not None:
            self.check_weights(None if placed is None else placed.plan.weights)
            multiply_in_fp8(transformer)
        for block in transformer.transformer_blocks:
            if self.attention is not None:
                block.attn1.attention = int8_joint_attention
            if self.compiled:
                block.compile()

    @property
    def weights(self) -> str:
        """The 8 bits that weights are rounded to where a plan for memory needs that: those of the products."""
        return self.products or "int8"

    def check_weights(self, form: str | None) -> None:
        """Raises SettingsError for weights in 8 bits that these policies would round again."""
        if self.products is not None and form not in (None, "fp8"):
            raise SettingsError(f"products is {self.products!r}, but weights are in {form}; leave one out")

    def check(self, settings: Settings, batch_size: int) -> None:
        """Raises SettingsError for a call that these policies cannot serve."""
        if self.step_cache is not None and batch_size > 1:
            raise SettingsError(f"batch_size is {batch_size}; with step_cache it must be 1, each clip skips by itself")
        if self.step_cache is not None and settings.longer == "windows":
            raise SettingsError("longer is 'windows', each of which would need a cache; leave step_cache out")

    def recorded(self) -> dict[str, dict]:
        """What a video carries of it."""
        return {} if self == Speed() else {"speed": asdict(self)}

    @classmethod
    def read(cls, record: object) -> Self:
        """From what a file says. Raises SettingsError for what is none."""
        names = {f.name for f in fields(cls)}
        if not isinstance(record, dict) or not set(record) <= names:
            raise SettingsError(f"speed is {str(record)[:60]!r}; it must be a table of {', '.join(sorted(names))}")
        return cls(**record)
