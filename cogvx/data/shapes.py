"""Shapes World: procedural clips of one moving shape, each with the prompt that describes it.

17 frames of 64 x 64 pixels at 8 frames a second. The grammar of a prompt is

    a [small |large ]COLOUR SHAPE MOTION on a BACKGROUND background

with the words of `COLOURS`, `SHAPES`, `MOTIONS` and `BACKGROUNDS`. One in nine of the colour x shape x motion x
background combinations is held out of all training (`is_held_out`). Another colour can be rendered too, of which the
embedded checkpoints know nothing: it is there to be learnt.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np

NUM_FRAMES, SIDE, FPS = 17, 64, 8

# CSS colours, [R, G, B] in 0 ... 255.
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (128, 0, 128),
    "orange": (255, 165, 0),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
NEW_COLOURS = {"plum": (221, 160, 221)}  # not of the grammar
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks")
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "navy": (0, 0, 128)}
SIZES = ("small", "", "large")

# Half of a shape's width in pixels, lowest and highest: of a translation, and of the small end of a change of size.
HALF_WIDTHS = {"small": (7.0, 9.0), "": (10.0, 13.0), "large": (14.0, 17.0)}
HALF_WIDTHS_SMALL_END = {"small": (5.0, 7.0), "": (7.0, 9.0), "large": (9.0, 11.0)}
GROWTH = (1.8, 2.4)
TRAVEL = (14.0, 34.0)  # pixels over the clip
DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}

PROMPT = re.compile(
    rf"a (?:(?P<size>small|large) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?P<motion>{'|'.join(MOTIONS)}) on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True)
class Scene:
    """What a prompt says, and nothing that it leaves open."""

    colour: str
    shape: str
    motion: str
    background: str
    size: str = ""

    @property
    def prompt(self) -> str:
        size = self.size + " " if self.size else ""
        return f"a {size}{self.colour} {self.shape} {self.motion} on a {self.background} background"


ALL_SCENES = tuple(Scene(*words) for words in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS))


def parse(prompt: str) -> Scene:
    """The scene of a prompt. Raises ValueError for a prompt outside the grammar."""
    match = PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt is {prompt!r}, which is not of the form of {ALL_SCENES[0].prompt!r}")
    return Scene(**{name: word or "" for name, word in match.groupdict().items()})


def is_held_out(scene: Scene) -> bool:
    """Whether the combination is kept out of training: for each colour and motion one pair of shape and background."""
    colour, motion = list(COLOURS).index(scene.colour), MOTIONS.index(scene.motion)
    shape, background = SHAPES.index(scene.shape), list(BACKGROUNDS).index(scene.background)
    return shape == (colour + motion) % 3 and background == (colour // 3 + motion // 2 + motion % 3) % 3


TRAINING_SCENES = tuple(scene for scene in ALL_SCENES if not is_held_out(scene))
HELD_OUT_SCENES = tuple(scene for scene in ALL_SCENES if is_held_out(scene))


def sample_scene(rng: np.random.Generator, scenes: tuple[Scene, ...] = TRAINING_SCENES) -> Scene:
    """A scene drawn from `scenes`, with a size drawn beside it."""
    scene = scenes[rng.integers(len(scenes))]
    return Scene(scene.colour, scene.shape, scene.motion, scene.background, SIZES[rng.integers(len(SIZES))])


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A clip of the scene, uint8 [17, 64, 64, 3]; where, how large and how fast come from `rng`."""
    half_width, x, y = _path(scene, rng)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    colour = np.array((COLOURS | NEW_COLOURS)[scene.colour], np.float32)
    cover = np.stack([_coverage(scene.shape, *at) for at in zip(half_width, x, y, strict=True)])[..., None]
    return np.rint(background + cover * (colour - background)).astype(np.uint8)


def _path(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half width and centre of the shape in pixels, frame by frame; it never leaves the picture."""
    time = np.linspace(0.0, 1.0, NUM_FRAMES)
    if scene.motion in DIRECTIONS:
        largest = rng.uniform(*HALF_WIDTHS[scene.size])
        half_width = np.full(NUM_FRAMES, largest)
        dx, dy = DIRECTIONS[scene.motion]
    else:
        smallest = rng.uniform(*HALF_WIDTHS_SMALL_END[scene.size])
        largest = smallest * rng.uniform(*GROWTH)
        half_width = smallest + (largest - smallest) * (time if scene.motion == "grows" else 1.0 - time)
        dx = dy = 0
    low, room = largest + 1.5, SIDE - 2 * (largest + 1.5)
    travel = min(rng.uniform(*TRAVEL), room)
    x, y = (
        low + rng.uniform() * (room - travel * abs(step)) + travel * abs(step) * (time if step >= 0 else 1.0 - time)
        for step in (dx, dy)
    )
    return half_width, x, y


def _coverage(shape: str, half_width: float, x: float, y: float) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1, [64, 64]: a linear edge one pixel wide."""
    dx = np.arange(SIDE, dtype=np.float32)[None, :] + 0.5 - np.float32(x)
    dy = np.arange(SIDE, dtype=np.float32)[:, None] + 0.5 - np.float32(y)
    if shape == "circle":
        outside = np.sqrt(dx * dx + dy * dy) - half_width
    elif shape == "square":
        outside = np.maximum(np.abs(dx), np.abs(dy)) - half_width
    else:  # an equilateral triangle, point up, in the middle of its bounding box
        half_height = half_width * np.sqrt(3.0) / 2.0
        flank = (np.abs(dx) * np.sqrt(3.0) - (dy + half_height)) / 2.0
        outside = np.maximum(flank, dy - half_height)
    return np.clip(0.5 - outside, 0.0, 1.0)
