"""The command line: a word to a function.

Each command is a module of `cogvx.commands` whose `main` is run with the arguments that its signature names.
"""

import importlib
import sys

COMMANDS = {
    "generate": "make a video from a prompt",
    "show": "print how a video was made",
    "replay": "make a video again and compare",
    "encode": "turn a video into latents",
    "decode": "turn latents into a video",
    "verify": "check a checkpoint folder: names, shapes, hashes, a forward pass, parity with diffusers",
    "doctor": "print versions, devices, and which kernels run",
    "evaluate": "measure the embedded checkpoint on Shapes World",
    "demo": "make a video with the embedded checkpoint, and a contact sheet beside it",
}
USAGE = "usage: cogvx COMMAND [OPTIONS]\n\n" + "\n".join(f"  {word:10}{text}" for word, text in COMMANDS.items())


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(f"{USAGE}\n\nThe options of one: cogvx COMMAND --help")
        return
    if words[0] not in COMMANDS:
        raise SystemExit(fail(f"there is no command {words[0]!r}; valid: {', '.join(COMMANDS)}"))
    import tyro

    command = importlib.import_module(f".commands.{words[0]}", "cogvx")
    try:
        tyro.cli(command.main, args=words[1:], prog=f"cogvx {words[0]}", description=COMMANDS[words[0]])
    except (ValueError, OSError, ArithmeticError) as error:
        raise SystemExit(fail(str(error))) from error
    except KeyboardInterrupt:
        print("cogvx: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def fail(message: str) -> int:
    print(f"cogvx: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
