import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from cogvx.data.video import VideoError, check_writable, read_metadata, read_video, write_video

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT.parent / "shared" / "clips"
PROMPT = 'a "red" circle,\ndéplacé ● à gauche'
METADATA = {"prompt": PROMPT, "seed": 7, "guidance_scale": 6.0, "nested": {"a": [1, None, True]}}


def moving_disc(num_frames=17, height=64, width=64):
    """A bright disc that moves over a soft gradient."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ground = np.stack([x * 90 / width, y * 120 / height, 60 + 0 * x], axis=-1)
    frames = []
    for t in range(num_frames):
        centre = width * (0.3 + 0.4 * t / num_frames)
        distance = np.hypot(x - centre, y - height / 2) - height / 6
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        frames.append(ground * (1 - cover) + np.array([255, 165, 0]) * cover)
    return np.stack(frames).round().astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9))


def write_other(path, frames, codec="libx264", pix_fmt="yuv420p", packets=lambda packets: packets, **options):
    """A video by another writer; `packets` may change or leave out what is stored."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        encoded = []
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts = i
            encoded += stream.encode(frame)
        container.mux(packets(encoded + stream.encode(None)))
    return path


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, moving_disc(), 8, METADATA)
    return path


# Writing, and reading what was written


@pytest.mark.parametrize(
    ("shape", "bar"), [((17, 64, 64), 31), ((5, 480, 720), 42), ((1, 64, 64), 31), ((9, 16, 34), 28), ((2, 66, 98), 31)]
)
def test_frames_come_back_in_their_size_and_nearly_their_values(tmp_path, shape, bar):
    frames = moving_disc(*shape)
    write_video(tmp_path / "clip.mp4", frames, 8)
    back, fps = read_video(tmp_path / "clip.mp4")
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert psnr(frames, back) > bar
    assert fps == 8 and isinstance(fps, int)


def test_flat_colours_are_kept_within_two_levels(tmp_path):
    colours = np.array(
        [[255, 0, 0], [0, 128, 0], [0, 0, 255], [255, 255, 0], [128, 0, 128], [0, 0, 0], [255, 255, 255]]
    )
    frames = np.broadcast_to(colours[:, None, None], (7, 32, 32, 3)).astype(np.uint8)
    write_video(tmp_path / "flat.mp4", frames, 8)
    back, _ = read_video(tmp_path / "flat.mp4")
    assert np.abs(back.astype(int) - frames).max() <= 2


def test_colours_do_not_drift_when_a_clip_is_read_and_written_again(clip, tmp_path):
    first, _ = read_video(clip)
    write_video(tmp_path / "again.mp4", first, 8)
    again, _ = read_video(tmp_path / "again.mp4")
    assert psnr(first, again) > 43
    assert np.abs(first.mean((0, 1, 2)) - again.mean((0, 1, 2))).max() < 0.25


@pytest.mark.parametrize("fps", [8, 16, 7.5, 0.5, 24000 / 1001])
def test_the_rate_is_kept(tmp_path, fps):
    write_video(tmp_path / "clip.mp4", moving_disc(3, 16, 16), fps)
    assert read_video(tmp_path / "clip.mp4")[1] == pytest.approx(fps, rel=1e-6)


def test_the_file_is_h264_yuv420p_and_lasts_as_long_as_its_frames(clip):
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, container.duration) == (17, 17 * 1_000_000 // 8)
        assert "creation_time" not in container.metadata
    assert b" threads=1 lookahead_threads=1 " in clip.read_bytes()  # x264 writes its settings into the stream


def test_metadata_comes_back(clip, tmp_path):
    assert read_metadata(clip) == METADATA
    write_video(tmp_path / "none.mp4", moving_disc(1, 16, 16), 8)
    assert read_metadata(tmp_path / "none.mp4") == {}


def test_views_of_any_layout_are_written_alike(tmp_path):
    frames = moving_disc(3, 32, 32)
    strided = np.ascontiguousarray(frames.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    write_video(tmp_path / "a.mp4", frames, 8)
    write_video(tmp_path / "b.mp4", strided, 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_the_same_frames_give_the_same_bytes_in_any_process_at_any_thread_count(tmp_path):
    np.save(tmp_path / "frames.npy", moving_disc(6, 480, 720))
    program = (
        "import sys, numpy as np, torch; from cogvx.data.video import write_video, write_contact_sheet;"
        "torch.set_num_threads(int(sys.argv[1])); torch.randn(300, 300) @ torch.randn(300, 300);"
        "frames = np.load('frames.npy'); write_video(sys.argv[2] + '.mp4', frames, 8, {'seed': 7});"
        "write_contact_sheet(sys.argv[2] + '.png', frames)"
    )
    for threads in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", program, threads, threads]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    for suffix in (".mp4", ".png"):
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (moving_disc(2, 63, 64), 8, "height of the frames must be even for H.264, not 63; nearest: 64"),
        (moving_disc(2, 64, 65), 8, "width of the frames must be even for H.264, not 65; nearest: 66"),
        (np.zeros((2, 8, 8, 3)), 8, r"frames must be a uint8 array \[T, H, W, 3\], not float64 \[2, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), 8, r"not uint8 \[8, 8, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), 8, r"frames must not be empty, but they are \[0, 8, 8, 3\]"),
        ([1], 8, "not int"),
        (moving_disc(1, 8, 8), 0, "fps must be from 0.01 to 1000, not 0"),
        (moving_disc(1, 8, 8), float("nan"), "fps must be from 0.01 to 1000, not nan"),
    ],
)
def test_what_h264_cannot_hold_is_refused(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "clip.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_metadata_that_json_cannot_hold_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_video(tmp_path / "clip.mp4", moving_disc(1, 8, 8), 8, {"scale": float("nan")})
    assert not list(tmp_path.iterdir())


# Where a file cannot be written


def test_unwritable_places_are_named_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in [
        (tmp_path / "no" / "clip.mp4", "there is no folder"),
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "clip.mp4", "there is no folder"),
        (Path(os.devnull), "it is no ordinary file"),
    ]:
        with pytest.raises(VideoError, match=f"cannot write {path}: {reason}"):
            check_writable(path)
    with pytest.raises(VideoError, match=r"the name must end in .mp4, such as clip.mp4"):
        check_writable(tmp_path / "clip.avi", ".mp4")
    check_writable(tmp_path / "clip.mp4", ".mp4")
    check_writable(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc, a folder nobody can write to")
def test_a_folder_nobody_can_write_to_is_named():
    with pytest.raises(VideoError, match=r"cannot write /proc/clip.mp4: "):
        check_writable("/proc/clip.mp4")
    with pytest.raises(VideoError, match=r"cannot write /proc/clip.mp4: "):
        write_video("/proc/clip.mp4", moving_disc(1, 8, 8), 8)


def test_a_full_disk_leaves_the_old_file_and_no_other(clip, tmp_path):
    before = clip.read_bytes()
    program = (
        "import resource, sys, numpy as np; from cogvx.data.video import VideoError, write_video;"
        "noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "\ntry: write_video(sys.argv[1], noise, 8)"
        "\nexcept VideoError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(clip)]
    done = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write {clip}: ")
    assert clip.read_bytes() == before
    assert list(tmp_path.iterdir()) == [clip]


def test_ctrl_c_leaves_no_partial_file(tmp_path):
    program = (
        "import sys, numpy as np; from cogvx.data.video import write_video;"
        "noise = np.random.default_rng(0).integers(0, 256, (1, 480, 720, 3), dtype=np.uint8);"
        "write_video(sys.argv[1], np.broadcast_to(noise, (2000, 480, 720, 3)), 8)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(tmp_path / "clip.mp4")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    begun = [path.name for path in tmp_path.iterdir()]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert len(begun) == 1 and begun[0] != "clip.mp4"
    assert b"KeyboardInterrupt" in errors
    assert not list(tmp_path.iterdir())


def test_a_link_keeps_pointing_to_the_file_that_is_written(tmp_path):
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real.mp4")
    write_video(tmp_path / "link.mp4", moving_disc(1, 16, 16), 8)
    assert (tmp_path / "link.mp4").is_symlink() and (tmp_path / "real.mp4").is_file()


# Reading what others wrote


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mkv", "libx264", "yuv420p"),
        ("a.mov", "libx264", "yuv444p"),
        ("a.mp4", "libx265", "yuv420p10le"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.mkv", "ffv1", "bgr0"),
    ],
)
def test_common_formats_are_read_whole(tmp_path, name, codec, pix_fmt):
    frames = moving_disc()
    back, fps = read_video(write_other(tmp_path / name, frames, codec, pix_fmt))
    assert back.shape == frames.shape and fps == 8
    assert psnr(frames, back) > (80 if codec == "ffv1" else 25)


def test_odd_sizes_of_others_are_read_exactly(tmp_path):
    frames = moving_disc(3, 63, 65)
    back, _ = read_video(write_other(tmp_path / "odd.mkv", frames, "ffv1", "yuv420p"))
    assert back.shape == frames.shape and psnr(frames, back) > 28


@pytest.mark.parametrize("keep", [1.0, 0.99, 0.9, 0.5])
@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.mkv", "ffv1"), ("a.webm", "libvpx-vp9")])
def test_a_matroska_file_is_read_whole_or_not_at_all(tmp_path, name, codec, keep):
    whole = write_other(tmp_path / name, moving_disc(), codec).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * keep)])
    if keep == 1:
        assert len(read_video(tmp_path / name)[0]) == 17
    else:
        with pytest.raises(VideoError, match="cut short"):
            read_video(tmp_path / name)


def test_a_changing_rate_is_no_damage(tmp_path):
    def spread(packets):
        for packet in packets:
            packet.pts, packet.dts = packet.pts**2, packet.dts**2
        return packets

    for name in ("a.mkv", "a.mp4"):
        path = write_other(tmp_path / name, moving_disc(6), packets=spread, bf="0")
        assert len(read_video(path)[0]) == 6


def test_frames_that_an_edit_list_hides_stay_hidden(tmp_path):
    def early(packets):
        for packet in packets:
            packet.pts, packet.dts = packet.pts - 3, packet.dts - 3
        return packets

    whole, _ = read_video(write_other(tmp_path / "whole.mp4", moving_disc(9), bf="0"))
    shown, _ = read_video(write_other(tmp_path / "shown.mp4", moving_disc(9), packets=early, bf="0"))
    assert np.array_equal(shown, whole[3:])


@pytest.mark.parametrize("clip_name", ["t2v_1.mp4", "t2v_2.mp4", "t2v_3.mp4", "t2v_4.mp4"])
def test_real_clips_survive_a_round_trip(tmp_path, clip_name):
    if not (CLIPS / clip_name).is_file():
        pytest.skip(f"{clip_name} is not in {CLIPS}")
    frames, fps = read_video(CLIPS / clip_name)
    assert frames.shape == (49, 480, 720, 3) and fps == 8
    write_video(tmp_path / clip_name, frames[:5], fps)
    assert psnr(frames[:5], read_video(tmp_path / clip_name)[0]) > 42
    with pytest.raises(VideoError, match="was not made by cogvx"):
        read_metadata(CLIPS / clip_name)


# Damaged and hostile files


def broken_files(folder, clip):
    data = clip.read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"not a video at all\n" * 100,
        "half": data[: len(data) // 2],
        "last byte missing": data[:-1],
        "no index": data.replace(b"moov", b"none"),
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    }.items():
        (folder / name).write_bytes(content)
        yield folder / name
    write_other(folder / "anim.gif", moving_disc(2, 16, 16), "gif", "rgb8")
    write_other(folder / "old.mp4", moving_disc(2, 16, 16), "mjpeg", "yuvj420p")
    yield from (folder / "anim.gif", folder / "old.mp4", folder / "absent", folder)


def test_broken_files_are_named_in_one_line(tmp_path, clip):
    for path in broken_files(tmp_path, clip):
        with pytest.raises(VideoError) as caught:
            read_video(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) * 3 // 4], "cut short or damaged"),
        (lambda data: b"plain text", "is damaged, or no mp4, mov, mkv or webm video"),
        (lambda data: data.replace(b'{"prompt"', b'["prompt"'), "the 'cogvx' metadata of .* is damaged"),
    ],
)
def test_messages_say_what_is_wrong(clip, change, message):
    clip.write_bytes(change(clip.read_bytes()))
    with pytest.raises(VideoError, match=message):
        read_video(clip)
        read_metadata(clip)


def test_a_missing_file_and_a_foreign_codec_are_named(tmp_path):
    with pytest.raises(VideoError, match=r"cannot read .*absent: No such file"):
        read_video(tmp_path / "absent")
    path = write_other(tmp_path / "old.mp4", moving_disc(2, 16, 16), "mjpeg", "yuvj420p")
    with pytest.raises(VideoError, match=r"is coded as mjpeg, which is not supported; use H.264, HEVC, VP9 or AV1"):
        read_video(path)


def test_a_video_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    def repeated(packets):
        copies = [av.Packet(bytes(packets[0])) for _ in range(40)]
        for i, copy in enumerate(copies):
            copy.pts = copy.dts = i
            copy.stream, copy.time_base, copy.is_keyframe = packets[0].stream, packets[0].time_base, True
        return copies

    path = write_other(tmp_path / "black.mp4", np.zeros((1, 4096, 4096, 3), np.uint8), packets=repeated)
    assert path.stat().st_size < 2_000_000
    start = time.process_time()
    with pytest.raises(VideoError, match="is too large: 40 frames of 4096 x 4096 are more than"):
        read_video(path)
    assert time.process_time() - start < 2
    with pytest.raises(VideoError, match="is too large: 17 frames of 64 x 64 are more than 65536 pixels"):
        write_video(path, moving_disc(), 8)
        read_video(path, max_pixels=2**16)


def test_mutated_files_are_read_whole_or_refused(clip):
    data, dice = clip.read_bytes(), random.Random(0)
    verdicts = []
    for _ in range(300):
        mutated = bytearray(data)
        at = dice.randrange(len(data))
        kind = dice.choice(["bytes", "cut", "insert", "zeros"])
        if kind == "bytes":
            for _ in range(dice.choice([1, 1, 3, 10, 100])):
                mutated[dice.randrange(len(data))] = dice.randrange(256)
        elif kind == "cut":
            del mutated[at:]
        elif kind == "insert":
            mutated[at:at] = bytes(dice.randrange(1, 50))
        else:
            mutated[at : at + 50] = bytes(50)
        clip.write_bytes(mutated)
        try:
            verdicts.append(read_video(clip)[0].shape == (17, 64, 64, 3))
        except VideoError:
            verdicts.append(None)
    assert False not in verdicts
    assert 30 < verdicts.count(None) < 300
