"""In which ways processes share a video: chosen, or checked, before any work."""

import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import product

from ..denoise import window_length
from ..models.choices import decode_chunks, num_text_tokens
from ..models.vae import decode_chunks as pairs
from ..numerics import SAT, Numerics
from ..settings import Configs, Settings
from .links import ParallelError

AUTO = "auto"


@dataclass(frozen=True)
class Ways:
    """How many processes share what: the sides of guidance, heads and tokens of attention, the VAE's frames or rows.

    The first three multiply to the number of processes. Some or all of them are dealt chunks of frames; or each has a
    strip of every frame's rows, which changes the last bits, and divides the memory that the VAE takes.
    """

    guidance: int = 1
    heads: int = 1
    tokens: int = 1
    frames: int = 1
    rows: int = 1

    @property
    def size(self) -> int:
        return self.guidance * self.heads * self.tokens

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        return ",".join(f"{name}={count}" for name, count in asdict(self).items())


NAMES = tuple(field.name for field in fields(Ways))


@dataclass(frozen=True)
class Limits:
    """The most processes that each way can use for one video."""

    guidance: int
    heads: int
    tokens: int  # of a whole sequence
    frames: int  # chunks that the VAE decodes
    rows: int  # of latents

    @classmethod
    def of(cls, configs: Configs, settings: Settings, numerics: Numerics = SAT, tiled: bool = False) -> "Limits":
        """Those of resolved settings; a VAE whose frames are tiled has all of them in one process."""
        tokens = sum(sequence(configs, settings, numerics))
        heads, frames = configs.transformer.num_attention_heads, len(chunks(configs, settings, numerics))
        height = settings.latent_shape(configs)[2]
        return cls(1 + settings.is_guided, heads, tokens, *((1, 1) if tiled else (frames, height)))


def sequence(configs: Configs, settings: Settings, numerics: Numerics = SAT) -> tuple[int, int]:
    """How many tokens of text and of vision the transformer sees at once."""
    config, (_, num_latents, *size) = configs.transformer, settings.latent_shape(configs)
    if settings.longer == "windows":
        num_latents = min(num_latents, window_length(config))
    grid = (n // p for n, p in zip((num_latents, *size), config.patch, strict=True))
    return num_text_tokens(config, numerics), math.prod(grid)


def chunks(configs: Configs, settings: Settings, numerics: Numerics = SAT) -> list[int]:
    """Latent frames of each chunk that a video is decoded in."""
    num_latents = settings.latent_shape(configs)[1] - settings.surplus_latents(configs)
    return decode_chunks(num_latents, numerics) or pairs(num_latents)


def choose_ways(asked: str, size: int, limits: Limits) -> Ways:
    """Ways for so many processes from "auto" or from words such as "guidance=2,heads=3".

    What such words leave out is 1; but frames are shared by as many as can, unless rows are. On its own the sides of
    guidance are kept apart where there are two and the number is even, since that sends least; then heads are traded,
    and where there are too few of them, or not as many as divide the number, keys go round.

    Raises ParallelError that names what does not fit, its value and what is valid.
    """
    if size < 1:
        raise ParallelError(f"the number of processes is {size}; it must be at least 1")
    ways = automatic(size, limits) if asked == AUTO else read_ways(asked)
    if ways.frames == 0:
        ways = replace(ways, frames=min(size, limits.frames) if ways.rows == 1 else 1)
    check_ways(ways, size, limits)
    return ways


def automatic(size: int, limits: Limits) -> Ways:
    guidance = 2 if limits.guidance == 2 and size % 2 == 0 else 1
    rest = size // guidance
    heads = max(n for n in range(1, min(rest, limits.heads) + 1) if rest % n == 0)
    return Ways(guidance, heads, rest // heads, 0)


def possible(size: int, limits: Limits) -> list[Ways]:
    """All ways for so many processes, as many of them decoding as can."""
    frames = min(size, limits.frames)
    each = product(range(1, limits.guidance + 1), range(1, min(size, limits.heads) + 1))
    found = [Ways(g, heads, size // (g * heads), frames) for g, heads in each if size % (g * heads) == 0]
    return [ways for ways in found if ways.tokens <= limits.tokens // ways.heads]


def read_ways(text: str) -> Ways:
    """Ways as the words say; frames are 0 where they do not."""
    found = {"frames": 0}
    for word in text.split(","):
        name, _, count = (part.strip() for part in word.partition("="))
        if name not in NAMES or not count.isdecimal() or int(count) < 1 or name in (found.keys() - {"frames"}):
            what = f"{AUTO}, or numbers from 1 as in guidance=2,heads=2, of {', '.join(NAMES)}"
            raise ParallelError(f"parallel is {text[:60]!r}; it must be {what}")
        found[name] = int(count)
    return Ways(**found)


def check_ways(ways: Ways, size: int, limits: Limits) -> None:
    why = {
        "guidance": "guidance has two sides" if limits.guidance == 2 else "the video is made without guidance",
        "heads": f"the model has {limits.heads} heads",
        "tokens": f"the video has {limits.tokens} tokens, and heads are shared by {ways.heads}",
        "frames": f"the frames are decoded in {limits.frames} chunk{'s' if limits.frames > 1 else ''}"
                  if limits.frames <= size else f"there are {size} processes",
        "rows": f"latents have {limits.rows} rows" if limits.rows > 1 else "the VAE's frames are tiled",
    }  # fmt: skip
    most = {"guidance": limits.guidance, "heads": limits.heads, "tokens": limits.tokens // ways.heads,
            "frames": min(limits.frames, size), "rows": limits.rows}  # fmt: skip
    for name in NAMES:
        count = getattr(ways, name)
        if not 1 <= count <= most[name]:
            raise ParallelError(f"{name} of parallel is {count}, but {why[name]}; valid: 1 to {most[name]}")
    if ways.size != size:
        what = f"guidance {ways.guidance} x heads {ways.heads} x tokens {ways.tokens} make {ways.size}"
        raise ParallelError(f"parallel is {str(ways)!r}, for {size} processes: {what}; they must make {size}")
    if ways.rows not in (1, size):
        raise ParallelError(f"rows of parallel is {ways.rows}, for {size} processes; valid: 1, or {size}, all of them")
    if ways.rows > 1 and ways.frames > 1:
        raise ParallelError(f"parallel is {str(ways)!r}; frames or rows are shared, not both: let one of them be 1")
