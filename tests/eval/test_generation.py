"""Adherence over prompts: which are asked, how clips are made and judged, how shares are counted."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from cogvx.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    NEW_COLOURS,
    SHAPES,
    SIZES,
    Scene,
    is_held_out,
    parse,
    render,
)
from cogvx.eval.generation import (
    GROUPS,
    IMAGE_WORDS,
    WORDS,
    Share,
    compressed,
    evaluate_prompts,
    evaluation_scenes,
    given_clip,
    judge_scenes,
    judged_image_clip,
)


class Painter:
    """A pipeline that paints what is asked, but for the prompts that `mistake` changes."""

    configs = SimpleNamespace(takes_image=False)

    def __init__(self, mistake=lambda scene, seed: scene, fails_at: int | None = None):
        self.mistake, self.fails_at, self.calls = mistake, fails_at, []

    def batch(self, prompts, *, seed, batch_size, num_inference_steps, guidance_scale, progress):
        assert (num_inference_steps, guidance_scale, progress) == (50, 6.0, False)
        if self.fails_at is not None and seed >= self.fails_at:
            raise KeyboardInterrupt
        self.calls.append((len(prompts), seed))
        scenes = [self.mistake(parse(prompt), seed + i) for i, prompt in enumerate(prompts)]
        return [
            SimpleNamespace(frames=render(scene, np.random.default_rng(seed + i))) for i, scene in enumerate(scenes)
        ]


def evaluated(painter: Painter, num_prompts: int = 24, **settings):
    return evaluate_prompts(painter, num_prompts, seed=7, progress=False, **settings)


@pytest.mark.parametrize(("num_prompts", "seed"), [(480, 0), (480, 1), (96, 0)])
def test_prompts_are_half_held_out_and_balanced(num_prompts, seed):
    scenes = evaluation_scenes(num_prompts, seed)
    halves = {held_out: [s for s in scenes if is_held_out(s) == held_out] for held_out in (True, False)}
    assert len(scenes) == num_prompts and len(halves[True]) == len(halves[False]) == num_prompts // 2
    for half in halves.values():
        for field, words in {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "size": SIZES}.items():
            counts = Counter(getattr(scene, field) for scene in half)
            assert set(counts) == set(words) and max(counts.values()) - min(counts.values()) <= 2
        combinations = Counter((s.colour, s.shape, s.motion, s.background) for s in half)
        assert max(combinations.values()) - min(combinations.values()) <= 1
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert scenes == evaluation_scenes(num_prompts, seed)
    assert set(scenes) != set(evaluation_scenes(num_prompts, seed + 1))


def test_every_held_out_combination_is_asked_equally():
    counts = Counter((s.colour, s.shape, s.motion, s.background) for s in evaluation_scenes(480) if is_held_out(s))
    assert len(counts) == 48 and set(counts.values()) == {5}
    assert len({s for s in evaluation_scenes(480) if not is_held_out(s)}) == 240


@pytest.mark.parametrize("num_prompts", [-2, 0, 1, 7])
def test_odd_and_empty_counts_are_refused(num_prompts):
    with pytest.raises(ValueError, match=f"num_prompts is {num_prompts}, which is not an even number"):
        evaluation_scenes(num_prompts)


def test_right_clips_are_right():
    painter = Painter()
    found = evaluated(painter, batch_size=10)
    assert painter.calls == [(10, 7), (10, 17), (4, 27)]
    assert set(found) == set(GROUPS) and set(found["all"]) == set(WORDS)
    for word in WORDS:
        shares = [found[group][word] for group in GROUPS]
        assert all(share.value == 1.0 for share in shares)
        assert shares[0].judged + shares[1].judged == shares[2].judged
        assert shares[2].judged == 24 or word == "size"
    named = [s for s in evaluation_scenes(24, 7) if s.size and s.motion.startswith("moves")]
    assert found["all"]["size"].judged == len(named)


def test_mistakes_are_counted_where_they_are():
    def mistake(scene: Scene, seed: int) -> Scene:
        if is_held_out(scene):
            shape = SHAPES[(SHAPES.index(scene.shape) + 1) % 3]
            return Scene(scene.colour, shape, scene.motion, scene.background, scene.size)
        return Scene("white" if seed < 13 else scene.colour, scene.shape, scene.motion, scene.background, scene.size)

    found = evaluated(Painter(mistake), compress=False)
    repainted = sum(s.colour != "white" for s in evaluation_scenes(24, 7)[:6] if not is_held_out(s))
    assert found["held out"]["shape"] == found["held out"]["all right"] == Share(0, 12)
    assert found["held out"]["colour"] == found["seen"]["shape"] == Share(12, 12)
    assert found["seen"]["colour"] == found["seen"]["all right"] == Share(12 - repainted, 12) and repainted
    assert found["all"]["all right"] == Share(12 - repainted, 24)


def test_clips_are_judged_through_h264_unless_told():
    clip = render(parse("a large red circle moves left on a navy background"), np.random.default_rng(0))
    again = compressed(clip)
    assert again.shape == clip.shape and again.dtype == np.uint8 and (again != clip).any()
    assert np.abs(again.astype(int) - clip).mean() < 8


def test_a_stopped_run_goes_on_from_its_log(tmp_path):
    def mistake(scene: Scene, seed: int) -> Scene:
        return Scene("red", "circle", "grows", "black") if seed % 3 == 0 else scene

    whole = evaluated(Painter(mistake), batch_size=4, compress=False, log=tmp_path / "whole.jsonl")
    log = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluated(Painter(mistake, fails_at=7 + 12), batch_size=4, compress=False, log=log)
    with log.open("a") as file:
        file.write('{"clip": 12, "prompt": "a re')  # what a kill leaves
    painter = Painter(mistake)
    assert evaluated(painter, batch_size=5, compress=False, log=log) == whole
    assert painter.calls == [(5, 19), (5, 24), (2, 29)]
    assert log.read_text() == (tmp_path / "whole.jsonl").read_text()
    painter = Painter(mistake)
    assert evaluated(painter, compress=False, log=log) == whole and not painter.calls
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["num_prompts"] == 24 and [line["clip"] for line in lines[1:]] == list(range(24))


def test_logs_of_other_runs_and_damaged_ones_are_refused(tmp_path):
    log = tmp_path / "log.jsonl"
    evaluated(Painter(), 2, compress=False, log=log, about={"model": "a"})
    with pytest.raises(ValueError, match=r"log is '.*log\.jsonl', which is of other settings"):
        evaluated(Painter(), 2, compress=True, log=log, about={"model": "a"})
    with pytest.raises(ValueError, match="of other settings"):
        evaluated(Painter(), 2, compress=False, log=log, about={"model": "b"})
    log.write_text(log.read_text().replace('{"clip"', "{clip"))
    with pytest.raises(ValueError, match="whose line 2 is not JSON"):
        evaluated(Painter(), 2, compress=False, log=log, about={"model": "a"})


def test_a_log_of_other_prompts_or_colours_is_refused(tmp_path):
    scenes, how = evaluation_scenes(2), {"compress": False, "log": tmp_path / "log.jsonl", "progress": False}
    records = judge_scenes(Painter(), scenes, **how)
    assert judge_scenes(Painter(fails_at=0), scenes, **how) == json.loads(json.dumps(records))
    with pytest.raises(ValueError, match="which is of other prompts; name another file"):
        judge_scenes(Painter(), scenes[::-1], **how)
    with pytest.raises(ValueError, match=r"of other settings than .*plum"):
        judge_scenes(Painter(), scenes, **how, palette=COLOURS | NEW_COLOURS)


@pytest.mark.parametrize(("right", "judged"), [(95, 100), (0, 10), (10, 10), (456, 480), (1, 3)])
def test_intervals_end_where_the_share_is_1_96_deviations_off(right, judged):
    share = Share(right, judged)
    low, high = share.interval
    assert 0 <= low <= share.value <= high <= 1
    for end in (low, high):
        if end != share.value:
            assert abs(share.value - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / judged), abs=1e-9)
    assert (low == share.value) == (right == 0) and (high == share.value) == (right == judged)


def test_a_known_interval():
    assert Share(95, 100).interval == pytest.approx((0.8882, 0.9785), abs=1e-4)


def test_nothing_judged_says_nothing():
    assert np.isnan(Share(0, 0).value) and Share(0, 0).interval == (0.0, 1.0)


class Mover:
    """A pipeline that goes on from the image it is given, `mistake` pixels off."""

    configs = SimpleNamespace(takes_image=True)

    def __init__(self, mistake=0):
        self.mistake, self.index = mistake, 0

    def __call__(self, prompt, *, image, seed, **how):
        clip = given_clip(parse(prompt), 7, self.index)
        assert seed == 7 + self.index and np.array_equal(image, clip[0])
        self.index += 1
        return SimpleNamespace(frames=np.roll(clip, self.mistake, axis=2))


@pytest.mark.parametrize(("mistake", "right"), [(0, 4), (1, 4), (3, 0)])
def test_a_model_that_takes_images_is_shown_a_first_frame_and_judged_by_what_it_keeps(mistake, right, tmp_path):
    found = evaluate_prompts(Mover(mistake), 4, seed=7, progress=False, log=tmp_path / "log")["all"]
    assert found == {word: Share(right if word in ("place", "kept") else 4, 4) for word in IMAGE_WORDS}
    assert len((tmp_path / "log").read_text().splitlines()) == 5


def test_another_colour_and_another_shape_are_not_kept():
    scene = parse(prompt := "a red circle moves left on a black background")
    clip = given_clip(scene, 0, 0)
    for changed, word in ((prompt.replace("red", "cyan"), "colour"), (prompt.replace("circle", "square"), "shape")):
        right = judged_image_clip(given_clip(parse(changed), 0, 0), clip, scene, 0, compress=False)["right"]
        assert [name for name, value in right.items() if not value] == [word, "kept"]
    blank = judged_image_clip(np.zeros_like(clip), clip, scene, 0, compress=False)["right"]
    assert not any(blank.values())
