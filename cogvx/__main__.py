"""The command line: a word to a function.

Each command is a module of `cogvx.commands` whose `main` is run with the arguments that its signature names.
"""

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable

from .allocator import keep_freed_memory

COMMANDS = {
    "generate": "make a video from a prompt",
    "show": "print how a video was made",
    "replay": "make a video again and compare",
    "encode": "turn a video into latents",
    "decode": "turn latents into a video",
    "extend": "go on where a video ends",
    "invert": "find the noise that a video is made from, and make it again",
    "verify": "check a checkpoint: hashes of a download, names, shapes, a forward pass, parity with diffusers",
    "plan": "say in how much memory a video can be made, and how",
    "doctor": "print versions, devices, and which kernels run",
    "convert": "write a transformer, VAE or LoRA in another format: diffusers, one file, SAT",
    "train": "train a transformer, a LoRA or a VAE on a folder of clips",
    "evaluate": "measure the embedded checkpoint on Shapes World",
    "demo": "make a video with the embedded checkpoint, and a contact sheet beside it",
}
ALONE = ("replay", "encode", "decode", "extend", "invert", "convert", "evaluate", "demo")  # write, and share no work
USAGE = "usage: cogvx COMMAND [OPTIONS]\n\n" + "\n".join(f"  {word:10}{text}" for word, text in COMMANDS.items())


# They warn of what no user of the commands can mend, and transformers loads them wherever they are installed.
NOISY = ("torchao", "torch.utils._pytree")


def main() -> None:
    keep_freed_memory()
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nThe options of one: cogvx COMMAND --help")
        return
    if words[0] not in COMMANDS:
        raise SystemExit(fail(f"there is no command {words[0]!r}; valid: {', '.join(COMMANDS)}"))
    try:
        run(words[0], words[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("cogvx: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_has_gone():  # `head` and the like have read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would fail
            raise SystemExit(141) from None
        if not is_answer(error):
            raise
        raise SystemExit(fail(one_line(error))) from error


def run(word: str, arguments: list[str]) -> None:
    call = parse(word, arguments)
    if word in ALONE:
        from .parallel.processes import refuse_torchrun

        refuse_torchrun(f"cogvx {word}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("cogvx: warning: %(message)s"))
    logging.getLogger("cogvx").addHandler(handler)
    try:
        call()
    finally:
        logging.getLogger("cogvx").removeHandler(handler)


def parse(word: str, arguments: list[str]) -> Callable[[], None]:
    """The command with its arguments filled in; words that do not fit end the program with one line and status 2."""
    import contextlib
    import io

    import tyro

    command = importlib.import_module(f".commands.{word}", "cogvx").main
    bind = functools.wraps(command)(lambda *args, **options: functools.partial(command, *args, **options))
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(bind, args=arguments, prog=f"cogvx {word}", description=COMMANDS[word])
    except SystemExit as end:
        if end.code:
            raise SystemExit(fail(f"{first_paragraph(boxed.getvalue())}; see cogvx {word} --help")) from None
        raise


def reader_has_gone() -> bool:
    """Whether what is printed goes into a pipe that nobody reads."""
    import select

    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def is_answer(error: Exception) -> bool:
    """Whether an error tells the user what to do otherwise: one of our own classes, or the system's.

    All else, a plain ValueError too, is a fault of the program, and its traceback is wanted.
    """
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] == "cogvx"


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())  # it may name what a file says, which must not steer the terminal
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def first_paragraph(boxed: str) -> str:
    """The first sentences in a box that tyro draws around an error."""
    lines = [line.strip("│ ") for line in boxed.splitlines() if not line.startswith("╭")]
    ends = (i for i, line in enumerate(lines) if not line or line[0] in "─╰")
    return " ".join(" ".join(lines[: next(ends, len(lines))]).split()).rstrip(".")


def fail(message: str) -> int:
    print(f"cogvx: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
