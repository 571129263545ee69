"""The judge of Shapes World clips: reads colour, shape, motion, background and size off the pixels alone.

Classical image analysis that never sees the prompt. The background is the colour of the picture's border. What
departs from it is the figure; its colour is that of its inside, and its soft coverage (how much of each pixel it
covers) gives position and area in each frame. The shape is the template, fitted by least squares, that most frames
agree on; the motion is a straight line through positions and sizes. What cannot be read with confidence is None, and
a background without a figure does not count: a blank clip or noise is right about nothing.

T frames, H W height and width; clips are uint8 [17, 64, 64, 3], coverages float32 [T, H, W] in 0 ... 1.
"""

from dataclasses import dataclass

import numpy as np

from ..data.shapes import BACKGROUNDS, COLOURS, NUM_FRAMES, SHAPES, SIDE, Scene

NEAR = 64.0  # distance in RGB within which a colour goes by its name; the nearest two, yellow and orange, are 90 apart
DEPARTS = 48.0  # distance in RGB from the background at which the figure starts; blue on navy is 127 away
SMALLEST_AREA = 20.0  # pixels; the smallest figure of the world, a triangle that starts to grow, covers 43
LEAST_FRAMES = 15  # of 17, in which the figure must be seen
LEAST_TRAVEL, MOST_DRIFT = 7.0, 0.5  # pixels over the clip (the world's least is 14); sideways share of that
LEAST_GROWTH = 1.35  # ratio of the last to the first width (the world's least is 1.8)
MOST_UNEVEN = 0.12  # departure from an even motion, rms, as a share of its extent; a single jump has 0.17
MOST_MISFIT = 0.13  # squared difference from the template as a share of the area; a square on its corner has 0.14
Palette = dict[str, tuple[int, int, int]]  # names and their R, G, B in 0 ... 255
HALF_WIDTH_LIMITS = (5.5, 9.5, 13.5, 19.0)  # pixels; small, unnamed and large lie between these


@dataclass(frozen=True)
class Reading:
    """What a clip shows, in the words of the prompts; None for what cannot be told."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    background: str | None = None
    size: str | None = None  # "small", "" or "large"; None also for what grows or shrinks
    half_width: float | None = None  # pixels, mean over the clip
    travel: tuple[float, float] | None = None  # pixels over the clip, right and down
    growth: float | None = None  # last over first width
    start: tuple[float, float] | None = None  # pixels, the figure's centre of mass in the first frame, x and y
    misfit: float | None = None  # of the shape's template, median over frames


@dataclass(frozen=True)
class Verdict:
    """Which words of a prompt its clip obeys."""

    colour: bool
    shape: bool
    motion: bool
    background: bool
    size: bool | None  # None where it is not judged: the prompt names no size, or the figure grows or shrinks

    @property
    def all_right(self) -> bool:
        return self.colour and self.shape and self.motion and self.background and self.size is not False


def judge(frames: np.ndarray, scene: Scene) -> Verdict:
    """Whether a clip, uint8 [17, 64, 64, 3], shows the scene."""
    return compare(read_clip(frames), scene)


def compare(reading: Reading, scene: Scene) -> Verdict:
    """Whether a reading agrees with the scene, word by word."""
    return Verdict(
        colour=reading.colour == scene.colour,
        shape=reading.shape == scene.shape,
        motion=reading.motion == scene.motion,
        background=reading.background == scene.background,
        size=reading.size == scene.size if scene.size and scene.motion.startswith("moves") else None,
    )


def read_clip(frames: np.ndarray, palette: Palette = COLOURS) -> Reading:
    """What a clip, uint8 [17, 64, 64, 3], shows; the figure's colour is one of `palette`.

    Raises:
        ValueError: for another shape or dtype.
    """
    if frames.shape != (NUM_FRAMES, SIDE, SIDE, 3) or frames.dtype != np.uint8:
        raise ValueError(
            f"frames is {frames.dtype} {list(frames.shape)}, which is not uint8 {[NUM_FRAMES, SIDE, SIDE, 3]}"
        )
    clip = frames.astype(np.float32)
    background, ground = _read_background(clip)
    if background is None:
        return Reading()
    colour, paint = _read_colour(clip, ground, palette)
    if paint is None:
        return Reading()
    cover = _cover(clip, ground, paint)
    seen = cover.sum((1, 2)) >= SMALLEST_AREA
    if seen.sum() < LEAST_FRAMES:
        return Reading()
    start = _centre(cover[0]) if seen[0] else None
    cover, time = cover[seen], np.linspace(0.0, 1.0, NUM_FRAMES)[seen]
    motion, travel, growth = _read_motion(cover, time)
    shape, half_width, misfit = _read_shape(cover)
    size = None
    if motion is not None and shape is not None and motion.startswith("moves"):
        size = _size_word(half_width)
    return Reading(colour, shape, motion, background, size, half_width, travel, growth, start, misfit)


def _read_background(clip: np.ndarray) -> tuple[str | None, np.ndarray]:
    """Name and measured colour of the picture's border, two pixels wide; no name where it is not of one colour."""
    inner = np.zeros((SIDE, SIDE), bool)
    inner[2:-2, 2:-2] = True
    border = clip[:, ~inner].reshape(-1, 3)
    ground = np.median(border, 0)
    even = (np.linalg.norm(border - ground, axis=1) < NEAR).mean()
    return (_nearest(ground, BACKGROUNDS) if even > 0.8 else None), ground


def _read_colour(clip: np.ndarray, ground: np.ndarray, palette: Palette) -> tuple[str | None, np.ndarray | None]:
    """Name and measured colour of the figure's inside; no name where it has several, nothing where none is seen."""
    departure = np.linalg.norm(_window_mean(clip, 1) - ground, axis=-1)
    figure = departure > DEPARTS
    if not figure.any():
        return None, None
    figure &= departure > 0.6 * np.percentile(departure[figure], 75)  # away from the blurred edge
    for depth in (2, 1):
        inside = clip[_window_mean(figure[..., None].astype(np.float32), depth)[..., 0] > 0.999]
        if len(inside) >= 3 * NUM_FRAMES:
            paint = np.median(inside, 0)
            even = (np.linalg.norm(inside - paint, axis=1) < NEAR).mean()
            return (_nearest(paint, palette) if even > 0.7 else None), paint
    return None, None


def _cover(clip: np.ndarray, ground: np.ndarray, paint: np.ndarray) -> np.ndarray:
    """How much of each pixel the figure covers, [T, H, W]: the pixel's place on the way from ground to paint."""
    way = paint - ground
    cover = np.clip((clip - ground) @ way / max(float(way @ way), 1.0), 0.0, 1.0)
    around = _window_mean(cover[..., None], 1)[..., 0]
    return np.where((cover > 0.1) & (around > 0.2), cover, 0.0)  # lone specks are noise


def _centre(cover: np.ndarray) -> tuple[float, float]:
    """The centre of mass of a frame's coverage [H, W], x and y in pixels."""
    at = np.arange(SIDE) + 0.5
    return float(cover.sum(0) @ at / cover.sum()), float(cover.sum(1) @ at / cover.sum())


def _read_motion(cover: np.ndarray, time: np.ndarray) -> tuple[str | None, tuple[float, float], float]:
    """The motion's words, the travel in pixels (right, down) and the growth, from straight lines through the clip."""
    area = cover.sum((1, 2))
    at = np.arange(SIDE) + 0.5
    places = {"x": cover.sum(1) @ at / area, "y": cover.sum(2) @ at / area, "width": np.sqrt(area)}
    lines = {name: np.polyfit(time, values, 1) for name, values in places.items()}
    uneven = {name: np.std(values - np.polyval(lines[name], time)) for name, values in places.items()}
    dx, dy = lines["x"][0], lines["y"][0]
    first, last = np.polyval(lines["width"], [0.0, 1.0])
    growth = last / first if min(first, last) > 0 else np.inf  # a line that falls below zero is no even motion
    along, across, axis = (dx, dy, "x") if abs(dx) > abs(dy) else (dy, dx, "y")
    motion = None
    if 1 / LEAST_GROWTH < growth < LEAST_GROWTH:
        if abs(along) >= LEAST_TRAVEL and abs(across) < MOST_DRIFT * abs(along):
            words = {"x": ("moves left", "moves right"), "y": ("moves up", "moves down")}[axis]
            motion = words[int(along > 0)] if uneven[axis] < MOST_UNEVEN * abs(along) else None
    elif abs(along) < LEAST_TRAVEL and uneven["width"] < MOST_UNEVEN * abs(last - first):
        motion = "grows" if growth > 1 else "shrinks"
    return motion, (float(dx), float(dy)), float(growth)


def _read_shape(cover: np.ndarray) -> tuple[str | None, float, float]:
    """The shape that more than half of the frames fit best, its mean half width and its median misfit."""
    fits = {shape: _fit(cover, shape) for shape in SHAPES}
    best = np.argmin([misfit for _, misfit in fits.values()], 0)
    votes = np.bincount(best, minlength=len(SHAPES))
    shape = SHAPES[int(votes.argmax())]
    half_width, misfit = (
        float(reduce(values)) for reduce, values in zip((np.mean, np.median), fits[shape], strict=True)
    )
    return (shape if 2 * votes.max() > len(cover) and misfit < MOST_MISFIT else None), half_width, misfit


def _fit(cover: np.ndarray, shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Half width of the template that is nearest to each frame, and what remains, as a share of the area; [T] each.

    Gauss-Newton on half width and centre, from the figure's area and centroid.
    """
    area = cover.sum((1, 2))
    at = np.arange(SIDE) + 0.5
    x, y = cover.sum(1) @ at / area, cover.sum(2) @ at / area
    half_width = np.sqrt(area / {"circle": np.pi, "square": 4.0, "triangle": np.sqrt(3.0)}[shape])
    if shape == "triangle":
        y = y - half_width / (2 * np.sqrt(3.0))  # its centroid lies below the middle of its bounding box
    place = np.stack([half_width, x, y], 1)  # [T, 3]
    for _ in range(3):
        model = _template(shape, place)
        slopes = np.stack([(_template(shape, place + step) - model) / 0.25 for step in 0.25 * np.eye(3)], 1)
        slopes = slopes.reshape(len(place), 3, -1)
        rest = (cover - model).reshape(len(place), -1, 1)
        step = np.linalg.solve(slopes @ slopes.transpose(0, 2, 1) + np.eye(3), slopes @ rest)[..., 0]
        place = place + np.clip(step, -2.0, 2.0)
    rest = cover - _template(shape, place)
    return place[:, 0], np.square(rest).sum((1, 2)) / area


def _template(shape: str, place: np.ndarray) -> np.ndarray:
    """The ideal coverage of a shape of half width and centre `place` [T, 3], [T, H, W]; the edge 1.5 pixels wide."""
    half_width, x, y = (place[:, i, None, None].astype(np.float32) for i in range(3))
    at = np.arange(SIDE, dtype=np.float32) + 0.5
    dx, dy = np.abs(at - x), at[:, None] - y
    if shape == "circle":
        outside = np.hypot(dx, dy) - half_width
    elif shape == "square":
        outside = np.maximum(dx, np.abs(dy)) - half_width
    else:
        half_height = half_width * np.float32(np.sqrt(0.75))
        outside = np.maximum((dx * np.float32(np.sqrt(3.0)) - dy - half_height) / 2, dy - half_height)
    return np.clip(0.5 - outside / 1.5, 0.0, 1.0)


def _window_mean(x: np.ndarray, depth: int) -> np.ndarray:
    """The mean over windows of 2 depth + 1 pixels a side, [T, H, W, C]; the border repeats its last pixel."""
    x = np.pad(x, ((0, 0), (depth, depth), (depth, depth), (0, 0)), mode="edge")
    x = sum(x[:, i : i + SIDE] for i in range(2 * depth + 1))
    return sum(x[:, :, i : i + SIDE] for i in range(2 * depth + 1)) / (2 * depth + 1) ** 2


def _nearest(colour: np.ndarray, palette: Palette) -> str | None:
    """The name of the nearest colour of a palette, if one is near."""
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < NEAR else None


def _size_word(half_width: float) -> str | None:
    lowest, small, large, highest = HALF_WIDTH_LIMITS
    if not lowest < half_width < highest:
        return None
    return "small" if half_width < small else "large" if half_width > large else ""
