"""A clip's training step in one process and split over two: `python two_ranks.py` fails where they differ."""

import os
import sys
import tempfile

import torch
import torch.distributed as dist

from cogvx.config import VAEConfig
from cogvx.models.discriminator import PatchDiscriminator
from cogvx.models.vae import CausalVAE
from cogvx.parallel.time_split import WHOLE, TimeSplit
from cogvx.train.losses import LossWeights, discriminator_step, vae_loss
from cogvx.train.perceptual import ConvFeatures, PerceptualDistance

CONFIG = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
WEIGHTS = LossWeights(l1=1.0, l2=0.5, perceptual=0.3, kl=0.1, adversarial=0.5)


def train_step(split: TimeSplit, dtype: torch.dtype, num_frames: int) -> list[torch.Tensor]:
    """The loss, the discriminator's, and the gradients of both."""
    torch.manual_seed(0)
    vae, discriminator = CausalVAE(CONFIG).to(dtype), PatchDiscriminator(8, 2).to(dtype)
    perceptual = PerceptualDistance(ConvFeatures.random(0, ((4,), (8,)))).to(dtype)
    video = torch.rand(1, 3, num_frames, 16, 16, dtype=dtype) * 2 - 1
    noise = torch.randn(1, 4, num_frames // 4 + 1, 2, 2, dtype=dtype)
    if split is not WHOLE:
        video, noise = video[:, :, split.frames], noise[:, :, split.latents]
    with split.of(vae):
        posterior = vae.encode(video, [video.shape[2]])
        latents = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
        output = vae.decode(latents, [latents.shape[2]])
        last = vae.decoder.conv_out.conv.weight
        loss = vae_loss(output, video, posterior, WEIGHTS, 0, {}, perceptual, discriminator, last, split)
        loss.backward()
    split.add_gradients(vae)
    judge = discriminator_step(discriminator, torch.optim.SGD(discriminator.parameters(), 0.0), output, video, split)
    assert all(not module._forward_pre_hooks and "forward" not in vars(module) for module in vae.modules())
    models = (vae, discriminator)
    return [split.added(loss.detach()), judge, *(p.grad for model in models for p in model.parameters())]


def differences(split: TimeSplit, dtype: torch.dtype, num_frames: int) -> list[float]:
    """Of the two losses, and of the gradients of both models: the relative error against one process.

    In float64 of each tensor by itself. In fp32 the gradients of a model are one vector: of single tensors, one process
    is 5e-5 away from its own result in float64 here.
    """
    ours, whole = train_step(split, dtype, num_frames), train_step(WHOLE, dtype, num_frames)
    if dtype == torch.float32:
        ours, whole = ([*x[:2], torch.cat([g.flatten() for g in x[2:]])] for x in (ours, whole))
    return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, whole, strict=True)]


def check(rank: int, size: int, place: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    # 9 and 17 frames are latent ones of 1 and 2, of 3 and 2.
    for dtype, num_frames, limit in ((torch.float64, 9, 1e-10), (torch.float64, 17, 1e-10), (torch.float32, 17, 1e-5)):
        worst = max(differences(TimeSplit(dist.group.WORLD, num_frames), dtype, num_frames))
        if rank == 0:
            print(f"{dtype} {num_frames} frames over {size}: {worst:.1e}", flush=True)
        if not worst <= limit:
            raise SystemExit(f"rank {rank}: {dtype}, {num_frames} frames: {worst} is above {limit}")
    dist.destroy_process_group()


def main(size: int) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(size):  # forked, so that torch is imported once
            child = os.fork()
            if child == 0:
                check(rank, size, f"{folder}/store")
                os._exit(0)
            children.append(child)
        return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
