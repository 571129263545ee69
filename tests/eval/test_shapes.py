"""The judge reads what was rendered, through compression, blur and noise, and calls wrong what is wrong."""

import io
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest

from cogvx.data.shapes import (
    ALL_SCENES,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    NEW_COLOURS,
    NUM_FRAMES,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    parse,
    render,
)
from cogvx.eval.shapes import Reading, Verdict, compare, judge, read_clip

EVERY_SCENE = [replace(scene, size=size) for scene in ALL_SCENES for size in SIZES]
WORDS = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS, "size": SIZES}
Y, X = np.mgrid[:SIDE, :SIDE] + 0.5


def compressed(frames: np.ndarray, crf: int = 17) -> np.ndarray:
    """The frames after H.264 with 4:2:0 chroma."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": str(crf)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def blurred(frames: np.ndarray, sigma: float) -> np.ndarray:
    """The frames under a Gaussian blur of `sigma` pixels."""
    weights = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    x = np.pad(frames.astype(np.float64), ((0, 0), (6, 6), (6, 6), (0, 0)), mode="edge")
    x = sum(w * x[:, i : i + SIDE] for i, w in enumerate(weights / weights.sum()))
    x = sum(w * x[:, :, i : i + SIDE] for i, w in enumerate(weights / weights.sum()))
    return np.rint(x).astype(np.uint8)


def noisy(frames: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """The frames with Gaussian noise of `sigma` levels."""
    noise = np.random.default_rng(seed).normal(0.0, sigma, frames.shape)
    return np.rint(frames + noise).clip(0, 255).astype(np.uint8)


def drawn(inside, colour=(255, 0, 0), background=(0, 0, 0)) -> np.ndarray:
    """A clip of the figure that `inside(time)` gives as a mask, time from 0 to 1."""
    masks = np.stack([inside(time) for time in np.linspace(0.0, 1.0, NUM_FRAMES)])
    return np.where(masks[..., None], np.array(colour, np.uint8), np.array(background, np.uint8))


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.hypot(X - x, Y - y) < radius


def shares_right(scenes: list[Scene], damage) -> dict[str, float]:
    """The share of rendered and damaged clips of which the judge reads each word as it was rendered."""
    right, judged = Counter(), Counter()
    for seed, scene in enumerate(scenes):
        verdict = judge(damage(render(scene, np.random.default_rng(seed))), scene)
        for word in WORDS:
            if getattr(verdict, word) is not None:
                judged[word] += 1
                right[word] += getattr(verdict, word)
    assert all(judged[word] == len(scenes) for word in WORDS if word != "size") and judged["size"] > len(scenes) // 3
    return {word: right[word] / judged[word] for word in WORDS}


def test_reads_compressed_clips():
    shares = shares_right(EVERY_SCENE[::19], compressed)
    assert min(shares.values()) >= 0.99, shares


@pytest.mark.parametrize(
    "damage",
    [
        lambda clip: compressed(blurred(clip, 1.5)),
        lambda clip: compressed(noisy(clip, 12.0, seed=1)),
        lambda clip: compressed(noisy(blurred(clip, 1.0), 8.0, seed=2), crf=30),
    ],
    ids=["blur", "noise", "blur-noise-crf30"],
)
def test_reads_damaged_clips(damage):
    shares = shares_right(EVERY_SCENE[::61], damage)
    assert min(shares.values()) >= 0.95, shares


@pytest.mark.soak
@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (compressed, 0.99),
        (lambda clip: compressed(noisy(blurred(clip, 1.5), 10.0, seed=3), crf=30), 0.98),
        (lambda clip: compressed(blurred(clip, 2.0)), 0.98),
    ],
    ids=["compressed", "blur-noise-crf30", "strong-blur"],
)
def test_reads_every_combination(damage, least):
    shares = shares_right(EVERY_SCENE, damage)
    assert min(shares.values()) >= least, shares


@pytest.mark.parametrize("changed", WORDS)
def test_another_word_is_wrong(changed):
    for index, scene in enumerate(EVERY_SCENE[5::97]):
        if changed == "size":
            scene = replace(scene, size="large", motion=MOTIONS[index % 4])
        reading = read_clip(compressed(render(scene, np.random.default_rng(index))))
        assert compare(reading, scene).all_right
        for word in set(WORDS[changed]) - {getattr(scene, changed), ""}:
            verdict = compare(reading, replace(scene, **{changed: word}))
            assert not verdict.all_right
            wrong = {name for name in WORDS if getattr(verdict, name) is False}
            assert changed in wrong and wrong <= {changed, "size"}  # another motion may bring the size into play


def test_size_is_judged_where_named_and_moving():
    clip = render(parse("a small red circle moves left on a gray background"), np.random.default_rng(0))
    assert judge(clip, parse("a small red circle moves left on a gray background")).size is True
    assert judge(clip, parse("a large red circle moves left on a gray background")).size is False
    assert judge(clip, parse("a red circle moves left on a gray background")).size is None
    grows = render(parse("a small red circle grows on a gray background"), np.random.default_rng(0))
    assert judge(grows, parse("a large red circle grows on a gray background")).size is None
    assert read_clip(grows).size is None


@pytest.mark.parametrize("size", SIZES)
def test_half_width_and_travel_are_measured(size):
    scene = Scene("cyan", "triangle", "moves up", "navy", size)
    reading = read_clip(compressed(render(scene, np.random.default_rng(3))))
    rows = np.flatnonzero((render(scene, np.random.default_rng(3))[..., 1] > 128).any(2).any(0))
    height, travel = 2 * reading.half_width * np.sqrt(0.75), -reading.travel[1]
    assert reading.size == size and abs(reading.travel[0]) < 0.5
    assert height + travel == pytest.approx(rows[-1] - rows[0] + 1, abs=1.5)


@pytest.mark.parametrize(
    "clip",
    [
        *(np.full((NUM_FRAMES, SIDE, SIDE, 3), rgb, np.uint8) for rgb in [*BACKGROUNDS.values(), (255, 255, 255)]),
        np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, SIDE, SIDE, 3), np.uint8),
        np.random.default_rng(1).integers(100, 156, (NUM_FRAMES, SIDE, SIDE, 3), np.uint8),
        drawn(lambda time: disc(16 + 30 * time, 32, 2)),  # too tiny
        drawn(lambda time: disc(16 + 30 * time, 32, 10) & (time < 0.6)),  # vanishes
        drawn(lambda time: disc(16 + 30 * time, 32, 10), background=(255, 192, 203)),
    ],
    ids=["black", "gray", "navy", "white", "noise", "faint-noise", "tiny", "vanishing", "pink-background"],
)
def test_what_cannot_be_read_is_right_about_nothing(clip):
    assert read_clip(clip) == Reading()
    for scene in EVERY_SCENE[::50]:
        verdict = judge(clip, scene)
        assert verdict == Verdict(False, False, False, False, verdict.size)
        assert not verdict.size and not verdict.all_right


@pytest.mark.parametrize(
    ("word", "clip"),
    {
        "static": ("motion", drawn(lambda time: disc(32, 32, 10))),
        "jump": ("motion", drawn(lambda time: disc(18 if time < 0.5 else 46, 32, 10))),
        "there-and-back": ("motion", drawn(lambda time: disc(18 + 28 * abs(2 * time - 1), 32, 10))),
        "diagonal": ("motion", drawn(lambda time: disc(18 + 28 * time, 18 + 28 * time, 10))),
        "moves-and-grows": ("motion", drawn(lambda time: disc(18 + 20 * time, 32, 8 + 10 * time))),
        "on-its-corner": ("shape", drawn(lambda time: abs(X - 18 - 28 * time) + abs(Y - 32) < 14)),
        "ellipse": ("shape", drawn(lambda time: np.hypot((X - 18 - 28 * time) / 8, (Y - 32) / 13) < 1)),
        "ring": ("shape", drawn(lambda time: disc(18 + 28 * time, 32, 12) & ~disc(18 + 28 * time, 32, 7))),
        "pair": ("shape", drawn(lambda time: disc(18 + 28 * time, 18, 8) | disc(18 + 28 * time, 46, 8))),
        "magenta": ("colour", drawn(lambda time: disc(18 + 28 * time, 32, 10), colour=(255, 0, 255))),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_outside_the_world_has_no_name(word, clip):
    reading = read_clip(clip)
    assert getattr(reading, word) is None and reading.background == "black"
    others = {"colour": "red", "shape": "circle", "motion": "moves right"}
    if word != "shape":
        assert all(getattr(reading, name) == others[name] for name in {"colour", "shape"} - {word})
    else:
        assert (reading.colour, reading.motion) == ("red", "moves right")


def test_two_colours_have_no_name():
    clip = drawn(lambda time: disc(18 + 28 * time, 32, 10))
    clip[:, 32:] = clip[:, 32:, :, ::-1]  # its lower half is blue
    assert read_clip(clip).colour is None


@pytest.mark.parametrize(
    "frames",
    [np.zeros((16, 64, 64, 3), np.uint8), np.zeros((17, 32, 64, 3), np.uint8), np.zeros((17, 64, 64, 3), np.float32)],
)
def test_other_clips_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames is (uint8|float32) \[\d+, \d+, 64, 3\], which is not uint8"):
        read_clip(frames)


def test_the_place_in_the_first_frame_is_the_centre_of_mass():
    clip = drawn(lambda time: disc(20 + 20 * time, 30, 9))
    assert read_clip(clip).start == pytest.approx((20, 30), abs=0.3)
    late = clip.copy()
    late[0] = 0
    assert read_clip(late).start is None and read_clip(late).colour == "red"


def test_a_new_colour_is_read_where_it_is_asked_for_and_is_no_other():
    for seed, name in enumerate(NEW_COLOURS):
        clip = compressed(render(Scene(name, "circle", "moves up", "gray"), np.random.default_rng(seed)))
        assert read_clip(clip, COLOURS | NEW_COLOURS).colour == name and read_clip(clip).colour is None
    for seed, scene in enumerate(EVERY_SCENE[::80]):
        clip = compressed(render(scene, np.random.default_rng(seed)))
        assert compare(read_clip(clip, COLOURS | NEW_COLOURS), scene).all_right, scene
