"""Shapes World: its grammar, its held-out combinations and what is drawn."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from cogvx.data.shapes import (
    ALL_SCENES,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT_SCENES,
    MOTIONS,
    NEW_COLOURS,
    NUM_FRAMES,
    PROMPT,
    SHAPES,
    SIDE,
    SIZES,
    TRAINING_SCENES,
    Scene,
    is_held_out,
    parse,
    render,
    sample_scene,
)

EVERY_SCENE = [replace(scene, size=size) for scene in ALL_SCENES for size in SIZES]


def departs(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """Where the clip is not of the background's colour, bool [T, H, W]."""
    return (clip != np.array(BACKGROUNDS[scene.background], np.uint8)).any(-1)


def middle(clip: np.ndarray, scene: Scene) -> np.ndarray:
    """Middle of the figure's bounding box in each frame, [T, 2] as (x, y)."""
    return np.array([np.argwhere(mask).min(0) + np.argwhere(mask).max(0) for mask in departs(clip, scene)])[:, ::-1] / 2


def test_prompts_are_those_of_the_grammar():
    sizes = {"": "", "small": "small ", "large": "large "}
    written = {
        f"a {sizes[size]}{colour} {shape} {motion} on a {background} background"
        for size, colour, shape, motion, background in product(
            sizes,
            ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"],
            ["circle", "square", "triangle"],
            ["moves left", "moves right", "moves up", "moves down", "grows", "shrinks"],
            ["black", "gray", "navy"],
        )
    }
    assert len(ALL_SCENES) == len(set(ALL_SCENES)) == 432 and len(written) == 1296
    assert {scene.prompt for scene in EVERY_SCENE} == written
    assert all(PROMPT.fullmatch(prompt) for prompt in written)


def test_parse_undoes_prompt():
    assert all(parse(scene.prompt) == scene for scene in EVERY_SCENE)
    assert parse("a large cyan triangle grows on a navy background") == Scene(
        "cyan", "triangle", "grows", "navy", "large"
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red circle",
        "a red circle moves left on a black background.",
        " a red circle moves left on a black background",
        "A red circle moves left on a black background",
        "a huge red circle moves left on a black background",
        "a small large red circle moves left on a black background",
        "a pink circle moves left on a black background",
        "a red hexagon moves left on a black background",
        "a red circle moves on a black background",
        "a red circle moves left on a red background",
        "a red  circle moves left on a black background",
        "a red circle moves left on a black background\n",
    ],
)
def test_parse_refuses_other_prompts(prompt):
    with pytest.raises(ValueError, match=r"prompt is .*, which is not of the form of 'a red circle"):
        parse(prompt)


def test_colours_are_those_of_css():
    assert COLOURS["green"] == (0, 128, 0) and COLOURS["orange"] == (255, 165, 0) and COLOURS["purple"] == (128, 0, 128)
    assert BACKGROUNDS == {"black": (0, 0, 0), "gray": (128, 128, 128), "navy": (0, 0, 128)}
    assert not set(COLOURS.values()) & set(BACKGROUNDS.values())


def test_held_out_scenes_are_balanced():
    assert len(HELD_OUT_SCENES) == 48 and len(TRAINING_SCENES) == 384
    assert set(HELD_OUT_SCENES) | set(TRAINING_SCENES) == set(ALL_SCENES)
    for word, words, each in (("colour", COLOURS, 6), ("motion", MOTIONS, 8), ("shape", SHAPES, 16)):
        assert Counter(getattr(scene, word) for scene in HELD_OUT_SCENES) == dict.fromkeys(words, each)
    backgrounds = Counter(scene.background for scene in HELD_OUT_SCENES)
    assert set(backgrounds) == set(BACKGROUNDS) and min(backgrounds.values()) >= 12


def test_size_does_not_change_what_is_held_out():
    assert all(is_held_out(replace(scene, size=size)) for scene in HELD_OUT_SCENES for size in SIZES)
    assert not any(is_held_out(replace(scene, size=size)) for scene in TRAINING_SCENES for size in SIZES)


def test_every_word_and_pair_of_words_is_trained():
    words = ("colour", "shape", "motion", "background")
    sizes = {"colour": 8, "shape": 3, "motion": 6, "background": 3}
    for a, b in product(words, words):
        pairs = {(getattr(scene, a), getattr(scene, b)) for scene in TRAINING_SCENES}
        assert len(pairs) == (sizes[a] if a == b else sizes[a] * sizes[b])


def test_drawn_scenes_come_from_their_tuple():
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng) for _ in range(600)]
    assert not any(is_held_out(scene) for scene in drawn)
    assert all(is_held_out(sample_scene(rng, HELD_OUT_SCENES)) for _ in range(100))
    assert min(Counter(scene.size for scene in drawn)[size] for size in SIZES) > 150
    again = np.random.default_rng(0)
    assert drawn == [sample_scene(again) for _ in range(600)]


def test_new_colours_are_in_no_scene_of_the_grammar_and_can_be_rendered():
    for name, rgb in NEW_COLOURS.items():
        scene = Scene(name, "square", "grows", "gray")
        assert name not in COLOURS and rgb not in COLOURS.values() and not PROMPT.fullmatch(scene.prompt)
        assert (render(scene, np.random.default_rng(0)) == rgb).all(-1).sum((1, 2)).min() > 100


@pytest.mark.parametrize("scene", EVERY_SCENE[::37], ids=lambda scene: scene.prompt)
def test_figure_is_whole_and_of_its_colour(scene):
    for seed in range(8):
        clip = render(scene, np.random.default_rng(seed))
        assert clip.shape == (NUM_FRAMES, SIDE, SIDE, 3) and clip.dtype == np.uint8
        figure = departs(clip, scene)
        assert figure.any((1, 2)).all()
        assert not figure[:, [0, -1]].any() and not figure[:, :, [0, -1]].any()
        pure = (clip == np.array(COLOURS[scene.colour], np.uint8)).all(-1)
        assert (pure.sum((1, 2)) > 0.5 * figure.sum((1, 2)))[figure.sum((1, 2)) > 100].all()
        for x, y in np.rint(middle(clip, scene)).astype(int)[:, :2]:
            assert pure[:, y, x].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_area_over_bounding_box_is_the_shapes(shape):
    scene = Scene("white", shape, "moves left", "black", "large")
    clip = render(scene, np.random.default_rng(0)).astype(float)[..., 0] / 255
    across, down = clip.max(1).sum(1), clip.max(2).sum(1)
    full = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}[shape]
    assert np.allclose(clip.sum((1, 2)) / (across * down), full, atol=0.04)
    assert np.allclose(down / across, 0.866 if shape == "triangle" else 1.0, atol=0.05)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_sizes_are_ordered(shape, motion):
    def least_areas(size: str) -> np.ndarray:
        scene = Scene("red", shape, motion, "black", size)
        clips = (render(scene, np.random.default_rng(seed)) for seed in range(12))
        return np.array([clip[..., 0].sum((1, 2), dtype=np.int64).min() / 255 for clip in clips])

    small, plain, large = (least_areas(size) for size in ("small", "", "large"))
    assert (small < plain).all() and (plain < large).all()
    if motion in DIRECTIONS:
        assert 1.2 * small.max() < plain.min() and 1.1 * plain.max() < large.min()


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_translations_go_their_way(motion):
    for seed, scene in enumerate(s for s in EVERY_SCENE[::7] if s.motion == motion):
        clip = render(scene, np.random.default_rng(seed))
        travel = np.array(middle(clip, scene))
        along = (travel[-1] - travel[0]) @ DIRECTIONS[motion]
        across = (travel[-1] - travel[0]) @ DIRECTIONS[motion][::-1]
        assert 13 <= along <= 35 and abs(across) <= 1
        assert (np.diff(travel @ DIRECTIONS[motion]) >= 0).all()
        area = departs(clip, scene).sum((1, 2))
        assert area.max() < 1.3 * area.min()


@pytest.mark.parametrize(("motion", "sign"), [("grows", 1), ("shrinks", -1)])
def test_changes_of_size_go_their_way(motion, sign):
    for seed, scene in enumerate(s for s in EVERY_SCENE[::7] if s.motion == motion):
        clip = render(scene, np.random.default_rng(seed))
        area = departs(clip, scene).sum((1, 2))[::sign]
        assert (np.diff(area) > -8).all() and 1.6**2 < area[-1] / area[0] < 2.6**2
        travel = middle(clip, scene)
        assert np.abs(travel - travel[0]).max() <= 1


def test_a_seed_is_a_clip():
    scene = Scene("orange", "triangle", "shrinks", "navy", "large")
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert (first == again).all() and (first != other).any()
