"""The command line as a new user meets it: one line for what is wrong, status 2, and no file left behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tyro.conf import Positional

import cogvx.commands.show
from cogvx.data.video import read_metadata, read_video, write_video

ROOT = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPT = "a red circle moves left"
QUICK = ("--num-frames", 9, "--num-inference-steps", 2, "--no-progress")


def python(program, *words, **options):
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def one_line(answer):
    """The message of a refused command."""
    status, out, err = answer
    assert status == 2 and out == "", (status, out, err)
    assert err.startswith("cogvx: error: ") and err.count("\n") == 1, err
    return err.removeprefix("cogvx: error: ").strip()


@pytest.fixture(scope="module")
def hollow(small_checkpoint, tmp_path_factory):
    """A checkpoint whose weight files are empty: whoever reads one meets another error."""
    folder = tmp_path_factory.mktemp("hollow") / "2b"
    shutil.copytree(small_checkpoint("2b"), folder)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    return folder


@pytest.fixture
def folder(small_checkpoint, tmp_path):
    """A checkpoint to spoil."""
    return Path(shutil.copytree(small_checkpoint("2b"), tmp_path / "folder"))


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "v.mp4", np.zeros((9, 48, 64, 3), np.uint8), 8, {"prompt": "x"})
    return tmp_path / "v.mp4"


def test_help_is_quick_because_nothing_heavy_is_imported():
    program = """
import sys
sys.argv = ["cogvx", "--help"]
from cogvx.__main__ import main
main()
heavy = {"torch", "numpy", "transformers", "diffusers", "tyro", "av", "tqdm", "huggingface_hub"}
print(heavy & set(sys.modules), file=sys.stderr)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out, err = python(program).communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert out.startswith("usage: cogvx COMMAND") and err == "set()\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # seconds of a CPU


@pytest.mark.parametrize("words", [
    ("replay", "a.mp4"), ("encode", "a.mp4", "-o", "b.safetensors"), ("decode", "a.safetensors", "-o", "b.mp4"),
    ("extend", "a.mp4", "x", "-o", "b.mp4"), ("invert", "a.mp4", "-o", "b.safetensors"),
    ("convert", "a", "b.safetensors", "--to", "single"), ("evaluate",), ("demo",),
    ("train", "vae"), ("train", "ladder"),
], ids=" ".join)  # fmt: skip
def test_what_one_process_does_is_not_done_by_several(run_command, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as torchrun does
    message = one_line(run_command(*words))
    command = " ".join(words[: 2 if words[0] == "train" else 1])
    assert message.startswith(f"cogvx {command} works in one process, and torchrun has started this one"), message
    assert not list(tmp_path.iterdir())


def test_every_command_of_the_list_has_a_help(run_command):
    status, out, _ = run_command()
    assert status == 0
    for word in (line.split()[0] for line in out.splitlines() if line.startswith("  ")):
        status, text, err = run_command(word, "--help")
        assert status == 0 and f"usage: cogvx {word}" in text and err == ""


@pytest.mark.parametrize(("words", "message"), [
    (["make"], "there is no command 'make'; valid: generate, show, replay, encode, decode, "),
    (["generate"], "Missing from cogvx generate: PROMPT what the video shows."),
    (["generate", "x", "-o", "a.mp4", "--frobnicate"], "Unrecognized options: --frobnicate"),
    (["generate", "x", "-o", "a.mp4", "--num-frames", "many"], "--num-frames: no type matching {None}|INT"),
    (["generate", "x", "-o", "a.mp4", "--num-frames", "8.5"], "['8.5']"),
    (["generate", "x", "-o", "a.mp4", "--sampler", "euler"], "invalid choice 'euler' for argument '--sampler'"),
    (["generate", "x", "-o", "a.mp4", "--numerics", "best"], "numerics is 'best'; valid: sat, diffusers, or either"),
    (["generate", "x", "-o", "a.mp4", "--guidance-scale", "6,x"], "guidance_scale is '6,x'; it must be a number"),
    (["generate", "x", "-o", "a.mp4", "--dtype", "int8"], "invalid choice 'int8' for argument '--dtype'"),
    (["show"], "Missing from cogvx show: FILE"),
])  # fmt: skip
def test_words_that_are_not_understood(words, message, run_command):
    assert message in one_line(run_command(*words))


@pytest.mark.parametrize(("words", "message"), [
    (["--num-frames", 8], "num_frames is 8; this model makes 8N+1 frames from 1 to 17, the nearest is 9"),
    (["--num-frames", 25], "num_frames is 25; this model makes 8N+1 frames from 1 to 17, the nearest is 17"),
    (["--height", 63], "height is 63; it must be a multiple of 16 pixels, the nearest is 64"),
    (["--width", 72], "width is 72; it must be a multiple of 16 pixels, the nearest is 64"),
    (["--num-inference-steps", 0], "num_inference_steps must be from 1 to 1000, not 0; nearest: 1"),
    (["--guidance-scale", "nan"], "guidance_scale is nan; it must be a finite number from 0"),
    (["--seed", -3], "seed is -3; it must be from 0 to"),
    (["--device", "abacus"], "device is 'abacus', which is not to be had"),
    (["-o", "gone/a.mp4"], "cannot write gone/a.mp4: there is no folder"),
    (["-o", "a.avi"], "cannot write a.avi: the name must end in .mp4, such as a.mp4"),
    (["--model", "nowhere"], "'nowhere' is no folder; give a checkpoint folder, a hub name like owner/name, tiny or"),
])  # fmt: skip
def test_settings_that_do_not_fit_cost_no_weight(words, message, hollow, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in one_line(run_command("generate", PROMPT, "-o", "a.mp4", "--model", hollow, *words))
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_is_refused_before_any_weight_is_read(hollow, run_command, tmp_path):
    message = one_line(run_command("generate", "", "-o", tmp_path / "a.mp4", "--model", hollow))
    assert message == "prompt is ''; say in words what the video shows"


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_an_unwritable_folder_is_refused_before_any_weight_is_read(hollow, run_command):
    assert "cannot write /proc/a.mp4" in one_line(run_command("generate", "x", "-o", "/proc/a.mp4", "--model", hollow))


def no_transformer(folder):
    shutil.rmtree(folder / "transformer")
    return f"{folder} is no checkpoint of a pipeline: the folder transformer is missing in it"


def missing_tensor(folder):
    tensors = load_file(folder / "vae" / WEIGHTS)
    del tensors["decoder.conv_in.conv.bias"]
    save_file(tensors, folder / "vae" / WEIGHTS)
    return f"{folder / 'vae'}: 1 missing (decoder.conv_in.conv.bias)"


def extra_tensor(folder):
    tensors = load_file(folder / "transformer" / WEIGHTS)
    save_file({**tensors, "lora.down": torch.zeros(1)}, folder / "transformer" / WEIGHTS)
    return f"{folder / 'transformer'}: 1 too many (lora.down)"


def other_shape(folder):
    tensors = load_file(folder / "transformer" / WEIGHTS)
    save_file({**tensors, "proj_out.bias": torch.zeros(3)}, folder / "transformer" / WEIGHTS)
    return "1 of another shape (proj_out.bias is [3], not [16])"


def pickled(folder):
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    return "is a pickle, which can run any code when it is read; only safetensors files are loaded"


def cut_short(folder):
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    return f"{file} is no intact safetensors file"


def noise(folder):
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(bytes(range(256)) * 20)
    return f"{file} is no intact safetensors file"


def bad_json(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    return f"{folder / 'scheduler' / 'scheduler_config.json'} is no valid JSON"


@pytest.mark.parametrize("spoil", [no_transformer, missing_tensor, extra_tensor, other_shape, pickled, cut_short, noise,
                                   bad_json])  # fmt: skip
def test_a_damaged_checkpoint_says_what_is_wrong_with_it(spoil, folder, run_command, tmp_path):
    message = spoil(folder)
    assert message in one_line(run_command("generate", PROMPT, "-o", tmp_path / "a.mp4", "--model", folder, *QUICK))
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(("model", "words"), [
    ("file.safetensors", "is a file; a checkpoint is a folder"),
    ("weights.bin", "is a pickle"),
    ("empty", "is no checkpoint"),
])  # fmt: skip
def test_what_is_no_checkpoint_folder(model, words, run_command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"x")
    message = one_line(run_command("generate", PROMPT, "-o", tmp_path / "a.mp4", "--model", tmp_path / model))
    assert words in message and str(tmp_path / model) in message


def test_a_prompt_that_is_too_long_is_cut_and_shows_what_was_cut(folder, run_command, tmp_path):
    prompt = f"{PROMPT} {PROMPT} {PROMPT} {PROMPT} and home"
    status, out, err = run_command("generate", prompt, "-o", tmp_path / "a.mp4", "--model", folder, *QUICK)
    assert status == 0 and "seed" in out
    assert err.startswith("cogvx: warning: the prompt is longer than 16 tokens; this was cut: '")
    assert err.strip().endswith("and home'") and err.count("\n") == 1
    assert read_metadata(tmp_path / "a.mp4")["prompt"] == prompt


def plant(file, name):
    tensors = load_file(file)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file)


@pytest.mark.parametrize(("component", "weight", "where"), [
    ("transformer", "transformer_blocks.1.ff.net.2.bias", "transformer_blocks.1.ff.net.2 in step 1 of 2"),
    ("vae", "decoder.conv_out.conv.bias", "CausalVAE.decoder.conv_out in decoding"),
])  # fmt: skip
def test_a_nan_in_the_weights_stops_and_leaves_no_file(component, weight, where, folder, run_command, tmp_path):
    plant(folder / component / WEIGHTS, weight)
    message = one_line(run_command("generate", PROMPT, "-o", tmp_path / "a.mp4", "--model", folder, *QUICK))
    assert where in message and weight in message
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("words", [["show"], ["replay"], ["encode", "-o", "l.safetensors"]])
@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (b"no video at all" * 100, "is damaged, or no mp4, mov, mkv or webm video"),
    (None, "cannot read"),
])  # fmt: skip
def test_a_damaged_video(words, content, message, hollow, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    model = [] if words == ["show"] else ["--model", hollow]
    line = one_line(run_command(words[0], "a.mp4", *words[1:], *model))
    assert message in line and "a.mp4" in line and not list(tmp_path.glob("*.safetensors"))


def test_a_video_that_is_cut_short(video, hollow, run_command, tmp_path):
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) - 60])
    words = ("encode", video, "-o", tmp_path / "l.safetensors", "--model", hollow)
    assert str(video) in one_line(run_command(*words))


def test_a_video_that_says_too_little_is_not_replayed(video, hollow, run_command, tmp_path):
    message = one_line(run_command("replay", video, "--model", hollow))
    assert "cannot be replayed: its metadata does not say negative_prompt, num_frames" in message
    write_video(tmp_path / "other.mp4", np.zeros((9, 48, 64, 3), np.uint8), 8)
    assert "does not say prompt" in one_line(run_command("replay", tmp_path / "other.mp4", "--model", hollow))
    assert "it is the file that is read" in one_line(run_command("replay", video, "-o", video))


@pytest.mark.parametrize(("shape", "message"), [
    ((8, 48, 64, 3), "has 8 frames; it must have 8N+1, the nearest is 9"),
    ((9, 44, 64, 3), "has height 44; it must be a multiple of 8, the nearest is 48"),
    ((9, 48, 68, 3), "has width 68; it must be a multiple of 8, the nearest is 64"),
])  # fmt: skip
def test_a_video_that_the_vae_cannot_take(shape, message, hollow, run_command, tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros(shape, np.uint8), 8)
    assert message in one_line(
        run_command("encode", tmp_path / "a.mp4", "-o", tmp_path / "l.safetensors", "--model", hollow)
    )


@pytest.mark.parametrize(("tensors", "message"), [
    ({"latents": torch.zeros(1, 5, 3, 6, 8)}, "it must hold one tensor of numbers, 'latents' of shape [1, 4, T, H, W]"),
    ({"z": torch.zeros(1, 4, 3, 6, 8)}, "holds {'z': [1, 4, 3, 6, 8]}; it must hold one tensor"),
    ({"latents": torch.zeros(1, 4, 3, 6, 8, dtype=torch.int32)}, "it must hold one tensor of numbers"),
    ({"latents": torch.full((1, 4, 3, 6, 8), torch.nan)}, "holds latents that are not finite"),
])  # fmt: skip
def test_latents_that_the_vae_cannot_take(tensors, message, hollow, run_command, tmp_path):
    save_file(tensors, tmp_path / "l.safetensors")
    words = ("decode", tmp_path / "l.safetensors", "-o", tmp_path / "a.mp4", "--model", hollow)
    assert message in one_line(run_command(*words))


def test_encode_and_decode_give_a_video_of_the_same_size_and_rate(small_checkpoint, run_command, tmp_path):
    write_video(tmp_path / "a.mp4", np.full((9, 32, 48, 3), 90, np.uint8), 12)
    latents, model = tmp_path / "l.safetensors", ("--model", small_checkpoint("2b"))
    status, out, _ = run_command("encode", tmp_path / "a.mp4", "-o", latents, *model)
    assert (status, out) == (0, f"{latents}  latents [1, 4, 3, 4, 6]\n")
    status, out, _ = run_command("decode", latents, "-o", tmp_path / "b.mp4", *model)
    assert status == 0 and "9 frames of 48 x 32" in out
    frames, fps = read_video(tmp_path / "b.mp4")
    assert frames.shape == (9, 32, 48, 3) and fps == 12
    assert "made with given latents" in one_line(run_command("replay", tmp_path / "b.mp4", *model))


def test_an_odd_count_of_latents_is_decoded_to_the_frames_it_was_made_of(small_checkpoint, run_command, tmp_path):
    # 15 of them: four frames each would be 60
    write_video(tmp_path / "a.mp4", np.full((57, 16, 16, 3), 90, np.uint8), 8)
    latents, model = tmp_path / "l.safetensors", ("--model", small_checkpoint("2b"))
    run_command("encode", tmp_path / "a.mp4", "-o", latents, *model)
    for numerics in ("sat", "diffusers"):
        _, out, _ = run_command("decode", latents, "-o", tmp_path / f"{numerics}.mp4", "--numerics", numerics, *model)
        assert "57 frames of 16 x 16" in out
        assert len(read_video(tmp_path / f"{numerics}.mp4")[0]) == 57


def test_show_prints_what_a_video_carries(video, run_command):
    status, out, _ = run_command("show", video)
    assert status == 0 and json.loads(out) == {"prompt": "x"}


def test_a_reader_that_has_read_enough_is_no_error(video):
    program = "import sys; sys.argv[0] = 'cogvx'; from cogvx.__main__ import main; main()"
    process = python(program, "show", video)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_a_fault_of_the_program_keeps_its_traceback(run_command, monkeypatch):
    def broken(file: Positional[Path]) -> None:
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(cogvx.commands.show, "main", broken)
    with pytest.raises(ValueError, match="unpack"):
        run_command("show", "a.mp4")


def test_ctrl_c_while_sampling_leaves_no_file(folder, tmp_path):
    words = ["generate", PROMPT, "-o", tmp_path / "out" / "a.mp4", "--model", folder, "--num-inference-steps", 1000]
    (tmp_path / "out").mkdir()
    run = python("import sys; from cogvx.__main__ import main; main()", *words)
    seen = ""
    while "1/1000" not in seen:  # the first step is done
        seen += (letter := run.stderr.read(1))
        assert letter, seen
    run.send_signal(signal.SIGINT)
    _, err = run.communicate()
    assert run.returncode == 130 and err.endswith("cogvx: stopped\n") and "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())


def test_ctrl_c_while_writing_leaves_no_file(folder, tmp_path):
    # The interrupt comes when some frames are in the temporary file.
    program = """
import os, signal
import cogvx.data.video as video
encode = video._encode
def interrupted(container, parts, rate):
    def cut_short():
        for part in parts:
            yield part[:5]
            print(len(os.listdir(os.environ["OUT"])), flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            yield part[5:]
    encode(container, cut_short(), rate)
video._encode = interrupted
from cogvx.__main__ import main
main()
"""
    out = tmp_path / "out"
    out.mkdir()
    words = ["generate", PROMPT, "-o", out / "a.mp4", "--model", folder, *QUICK]
    run = python(program, *words, env={**os.environ, "OUT": str(out)})
    printed, err = run.communicate()
    assert run.returncode == 130 and err == "cogvx: stopped\n" and printed == "1\n"
    assert not list(out.iterdir())
