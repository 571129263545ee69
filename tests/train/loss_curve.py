"""The losses of a hundred steps of a small model: `python tests/train/loss_curve.py` writes loss_curve.json anew.

Anything that changes what training computes shows in them: order and noise of the data, the model, its gradients, the
optimiser, the schedule.
"""

import json
import tempfile
from pathlib import Path

import torch

from cogvx.config import ScheduleConfig, TransformerConfig
from cogvx.models.transformer import ExpertTransformer
from cogvx.train.finetune import train
from cogvx.train.finetuning import Finetuning, Optimiser
from cogvx.train.sampling import Draws, Example

FILE = Path(__file__).with_suffix(".json")
SIZES = [(1, 4, 4), (3, 4, 6), (2, 6, 4), (2, 4, 4), (1, 6, 6)]  # T, H, W of latents
CONFIG = TransformerConfig(
    num_attention_heads=1, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=2, time_embed_dim=16,
    text_embed_dim=16, max_text_seq_length=8, sample_width=8, sample_height=8, sample_frames=17,
    use_rotary_positional_embeddings=True,
)  # fmt: skip


def machine() -> dict:
    """What the last bit of a loss depends on."""
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "vendor": vendor(),
    }


def vendor() -> str:
    """Of the CPU: libraries choose their products by it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")


def losses() -> list[float]:
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randn(4, *size, generator=generator), torch.full((4, *size), 0.1),
                torch.randn(8, 16, generator=generator)) for size in SIZES
    ]  # fmt: skip
    torch.manual_seed(0)
    model = ExpertTransformer(CONFIG).init_for_training()
    with tempfile.TemporaryDirectory() as folder:
        run = Finetuning(
            data=Path(folder), out=Path(folder) / "run", kind="transformer", num_steps=100, batch=2,
            precision="fp32", save_every=1000, device="cpu", optimiser=Optimiser(lr=3e-3, num_warmup=10),
        )  # fmt: skip
        train(run, model, examples, Draws(CONFIG, ScheduleConfig(), 0.7, torch.zeros(8, 16), 0.1, 0))
        return [json.loads(line)["loss"] for line in (run.out / "log.jsonl").read_text().splitlines()]


def main() -> None:
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({**machine(), "losses": losses()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
