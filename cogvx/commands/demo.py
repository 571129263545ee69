"""cogvx demo: make a video with the embedded checkpoint, and a contact sheet beside it."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

PROMPT = "a large orange square moves right on a navy background"
GUIDANCE = 3.0  # at the 6.0 of the released models the corners of the embedded one grow longer


def main(
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")] = PROMPT,
    output: Annotated[Path, arg(aliases=["-o"])] = Path("demo/square.mp4"),
    seed: int = 7,
) -> None:
    """Make a video with the embedded checkpoint, and a contact sheet beside it.

    Args:
        prompt: of the grammar of Shapes World, the embedded checkpoint's whole world.
        output: the mp4 to write; the contact sheet stands beside it as a PNG.
        seed: of the noise.
    """
    from ..data.video import check_writable, write_contact_sheet
    from ..pipeline import Pipeline

    output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(output, ".mp4")
    clip = Pipeline.from_pretrained("tiny")(prompt, guidance_scale=GUIDANCE, seed=seed)
    clip.save(output)
    sheet = output.with_suffix(".png")
    write_contact_sheet(sheet, clip.frames)
    print(f"\n{prompt!r}\nvideo:          {output.resolve()}\ncontact sheet:  {sheet.resolve()}")
    print(f"made in {clip.seconds:.1f} s")
