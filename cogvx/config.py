"""What a model looks like: one dataclass for each `config.json` of a published folder, with its field names.

`from_dict` and `to_dict` read and write such a file's content. Published fields that allow one value here (`fixed`) are
checked on reading, written on saving, and are no attributes.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

MAX_SIZE = 2**20  # of anything that is counted; far above every real model, and small enough that no size overflows
MAX_LAYERS = 256
MAX_PATCH = 64  # along an axis
TRAINED_1_5 = 96, 170  # height and width, in latent pixels, of the videos that the 1.5 models were trained at


class Published:
    """Reading and writing of the dataclasses below."""

    class_names: ClassVar[tuple[str, ...]]  # `_class_name` in the file; the first is written
    fixed: ClassVar[dict[str, Any]] = {}  # published fields with the one value that is supported
    ignored: ClassVar[tuple[str, ...]] = ()  # published fields that change nothing
    required: ClassVar[tuple[str, ...]] = ()  # fixed fields whose absence means another value to other readers

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The config that a published `config.json` holds. Raises ValueError that names the field."""
        if not isinstance(content, dict):
            raise ValueError(f"the config is a {type(content).__name__}, not an object with fields")
        name = content.get("_class_name", cls.class_names[0])
        if name not in cls.class_names:
            raise ValueError(f"_class_name is {name!r}, not {' or '.join(cls.class_names)}")
        given = {key: value for key, value in content.items() if not key.startswith("_") and key not in cls.ignored}
        cls._check_fixed(given)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(given.keys() - fields.keys() - cls.fixed.keys())
        if unknown:
            raise ValueError(f"{unknown[0]} is {_short(given[unknown[0]])}, a field that is not known")
        return cls(**{key: _typed(key, value, fields[key].type) for key, value in given.items() if key in fields})

    @classmethod
    def _check_fixed(cls, given: dict[str, Any]) -> None:
        for key, only in cls.fixed.items():
            if key in given and (given[key] != only or isinstance(given[key], bool) != isinstance(only, bool)):
                raise ValueError(f"{key} is {_short(given[key])}, which is not supported yet; supported is {only!r}")
            if key in cls.required and key not in given:
                raise ValueError(f"{key} is missing; supported is {only!r}")

    def to_dict(self) -> dict[str, Any]:
        """The content of a published `config.json`."""
        content = {"_class_name": self.class_names[0], **self.fixed}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            content[f.name] = list(value) if isinstance(value, tuple) else value
        return content

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= MAX_SIZE:
                    raise ValueError(f"{f.name} is {_short(number)}; it must be between 1 and {MAX_SIZE}")
                if isinstance(number, float) and not (math.isfinite(number) and number > 0):
                    raise ValueError(f"{f.name} is {number}; it must be a number above 0")


@dataclass(frozen=True)
class TransformerConfig(Published):
    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    num_layers: int = 30
    sample_width: int = 90  # latent pixels of the trained videos, but 300 x 300 in CogVideoX 1.5: see `latent_size`
    sample_height: int = 60
    sample_frames: int = 49  # frames of video, not latent ones
    patch_size: int = 2
    patch_size_t: int | None = None  # latent frames of a patch; CogVideoX 1.0 has no patches in time
    patch_bias: bool = True  # of the convolution that takes patches without time; those with time always have a bias
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False  # a table that is added to text and vision, with RoPE besides
    ofs_embed_dim: int | None = None

    class_names = ("CogVideoXTransformer3DModel",)
    fixed: ClassVar = {
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "dropout": 0.0,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers is {self.num_layers}; it must be at most {MAX_LAYERS}")
        rotated = self.use_rotary_positional_embeddings
        name, size = ("attention_head_dim", self.attention_head_dim) if rotated else ("the width", self.width)
        if size % 16:
            raise ValueError(f"{name} is {size}; the positions need a multiple of 16, try {-(-size // 16) * 16}")
        for name in ("sample_height", "sample_width"):
            size = getattr(self, name)
            if size % self.patch_size:
                raise ValueError(f"{name} is {size}, which is no multiple of patch_size {self.patch_size}")
        self._check_sizes()
        self._check_kind()

    def _check_sizes(self) -> None:
        if self.width > MAX_SIZE:
            raise ValueError(f"the width is {self.width}; it must be at most {MAX_SIZE}")
        for name in ("patch_size", "patch_size_t"):
            if (getattr(self, name) or 1) > MAX_PATCH:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most {MAX_PATCH}")
        if self.use_learned_positional_embeddings and self.num_positions > MAX_SIZE:
            raise ValueError(f"sample_frames, sample_height and sample_width make {self.num_positions} positions; "
                             f"a learned table has at most {MAX_SIZE}")  # fmt: skip

    def _check_kind(self) -> None:
        """Raises ValueError for parts that no released model has together, and that diffusers cannot run together."""
        needs_rope = {
            "use_learned_positional_embeddings": self.use_learned_positional_embeddings,
            "patch_size_t": self.patch_size_t is not None,
        }
        for name, given in needs_rope.items():
            if given and not self.use_rotary_positional_embeddings:
                raise ValueError(f"{name} is {getattr(self, name)} without use_rotary_positional_embeddings")
        if self.use_learned_positional_embeddings and self.patch_size_t is not None:
            raise ValueError(f"patch_size_t is {self.patch_size_t} with use_learned_positional_embeddings")
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            wanted = f"None or time_embed_dim {self.time_embed_dim}, to which it is added"
            raise ValueError(f"ofs_embed_dim is {self.ofs_embed_dim}; it must be {wanted}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, height and width of a patch."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def trained_grid(self) -> tuple[int, int, int]:
        """Patches of the trained videos along T, H and W."""
        latents = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        sizes = zip((latents, *self.latent_size), self.patch, strict=True)
        return tuple(-(-size // patch) for size, patch in sizes)

    @property
    def num_positions(self) -> int:
        """Rows of a learned table of positions: text, then the patches of the trained videos."""
        return self.max_text_seq_length + math.prod(self.trained_grid)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width, in latent pixels, of the videos that the model makes best."""
        # The 300 x 300 of the 1.5 models is the size of another library's table of positions, not of a video.
        sizes = self.sample_height, self.sample_width
        return TRAINED_1_5 if self.patch_size_t and sizes == (300, 300) else sizes


@dataclass(frozen=True)
class VAEConfig(Published):
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    scaling_factor: float = 1.15258426
    sample_height: int = 480  # pixels of the trained videos
    sample_width: int = 720
    invert_scale_latents: bool = False  # the latent of a conditioning image is divided by scaling_factor

    class_names = ("AutoencoderKLCogVideoX",)
    fixed: ClassVar = {
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
        "act_fn": "silu",
        "norm_eps": 1e-6,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    ignored = ("force_upcast",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.block_out_channels) != 4:
            raise ValueError(f"block_out_channels has {len(self.block_out_channels)} entries; it must have 4")
        if self.layers_per_block > MAX_LAYERS // 4:
            raise ValueError(f"layers_per_block is {self.layers_per_block}; it must be at most {MAX_LAYERS // 4}")
        if self.temporal_compression_ratio != 4:
            raise ValueError(f"temporal_compression_ratio is {self.temporal_compression_ratio}; supported is 4")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups is {self.norm_num_groups}, which does not divide {width} channels")

    def halves_time(self, level: int) -> bool:
        return 2 ** (level + 1) <= self.temporal_compression_ratio


@dataclass(frozen=True)
class ScheduleConfig(Published):
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 3.0
    sampler: str = "ddim"  # or "dpmpp_2m_sde"; `_class_name` in the file says it there

    class_names = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
    fixed: ClassVar = {
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    ignored = ("clip_sample_range", "sample_max_value")
    required = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr")

    samplers: ClassVar = {"ddim": class_names[0], "dpmpp_2m_sde": class_names[1]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in self.samplers:
            raise ValueError(f"sampler is {_short(self.sampler)}; it must be one of {', '.join(self.samplers)}")
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_end is {self.beta_end}; it must be between beta_start {self.beta_start} and 1")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        if isinstance(content, dict) and "sampler" in content:
            raise ValueError("sampler is no published field; _class_name says which one it is")
        config = super().from_dict(content)
        by_class = {name: sampler for sampler, name in cls.samplers.items()}
        return replace(config, sampler=by_class[content.get("_class_name", cls.class_names[0])])

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict() | {"_class_name": self.samplers[self.sampler]}
        del content["sampler"]
        return content


@dataclass(frozen=True)
class Preset:
    """The configs of one released model."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


_5B = TransformerConfig(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True)
_1_5_5B = replace(_5B, patch_size_t=2, patch_bias=False, sample_height=300, sample_width=300, sample_frames=81)
_5B_VAE = VAEConfig(scaling_factor=0.7)
_1_5_VAE = replace(_5B_VAE, invert_scale_latents=True)
_5B_SCHEDULE = ScheduleConfig(snr_shift_scale=1.0)

_TINY = TransformerConfig(
    num_attention_heads=4,
    num_layers=6,
    time_embed_dim=64,
    text_embed_dim=256,
    max_text_seq_length=32,
    sample_width=8,
    sample_height=8,
    sample_frames=17,
    use_rotary_positional_embeddings=True,
)
_TINY_VAE = VAEConfig(
    block_out_channels=(16, 32, 64, 96),
    layers_per_block=1,
    norm_num_groups=8,
    sample_height=64,
    sample_width=64,
)

PRESETS = {
    "2b": Preset(),
    "5b": Preset(_5B, _5B_VAE, _5B_SCHEDULE),
    "5b-i2v": Preset(replace(_5B, in_channels=32, use_learned_positional_embeddings=True), _5B_VAE, _5B_SCHEDULE),
    "1.5-5b": Preset(_1_5_5B, _1_5_VAE, _5B_SCHEDULE),
    "1.5-5b-i2v": Preset(replace(_1_5_5B, in_channels=32, ofs_embed_dim=512), _1_5_VAE, _5B_SCHEDULE),
    "tiny": Preset(_TINY, _TINY_VAE, _5B_SCHEDULE),
    "tiny-i2v": Preset(replace(_TINY, in_channels=32), _TINY_VAE, _5B_SCHEDULE),
}


def _typed(key: str, value: Any, kind: Any) -> Any:
    """`value` as read from JSON, as the type that the field has."""
    if kind == int | None:
        return None if value is None else _typed(key, value, int)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{key} is {_short(value)}; it must be a number above 0") from None
    if kind == tuple[int, ...] and isinstance(value, list):
        return tuple(_typed(key, number, int) for number in value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind == tuple[int, ...] or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = "list of int" if kind == tuple[int, ...] else kind.__name__
        raise ValueError(f"{key} is {_short(value)}; it must be of type {wanted}")
    return value


def _short(value: Any) -> str:
    """A value as it stands in an error message, at most about 60 characters."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
