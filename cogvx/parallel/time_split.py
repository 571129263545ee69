"""Context parallelism of the VAE: a clip's frames split over processes, with the results of one process.

A causal convolution receives the last two frames of the process before, and sends the gradient of those back; a norm
adds up its statistics over all processes. Every process then has the loss of its own frames, and the sum of all
processes' losses and gradients is that of the whole clip, encoded and decoded as one chunk.

    split = TimeSplit(group, num_frames=17)
    with split.of(vae):
        own = video[:, :, split.frames]
        posterior = vae.encode(own, [own.shape[2]])

Source: "CogVideoX" (arXiv 2408.06072), section 2.1; there the gradient of what is received is not sent back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels.group_norm_silu.reference import join_halo
from cogvx_kernels.spatial_norm_silu.reference import resize_nearest

from ..models.vae import CausalConv3d, CausalVAE, GroupNormSiLU, SpatialNormSiLU
from .frames import HALO
from .links import Link


class TimeSplit:
    """Which frames of a clip this process has, and what it does with the others.

    Raises ValueError for a number of frames other than 8N+1, and for more processes than those can be split over.
    """

    def __init__(self, group: dist.ProcessGroup | None, num_frames: int):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.num_latents = latents_of_each(num_frames, self.size)
        self.num_frames = [4 * n - 3 if rank == 0 else 4 * n for rank, n in enumerate(self.num_latents)]

    @property
    def frames(self) -> slice:
        """Of the frames of video, those of this process."""
        return self._own(self.num_frames)

    @property
    def latents(self) -> slice:
        """Of the latent frames, those of this process."""
        return self._own(self.num_latents)

    @property
    def share_of_frames(self) -> float:
        """By which the mean over own frames counts in that over the clip."""
        return self.num_frames[self.rank] / sum(self.num_frames)

    @property
    def share_of_latents(self) -> float:
        return self.num_latents[self.rank] / sum(self.num_latents)

    def added(self, x: Tensor) -> Tensor:
        """The sum of x over all processes; no gradient passes."""
        if self.group is None:
            return x
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def whole(self, video: Tensor) -> Tensor:  # [B, C, own T, H, W] -> [B, C, T, H, W]
        """The clip of which every process has some frames; the gradient finds its way back."""
        return video if self.group is None else _Whole.apply(video, self.frames, sum(self.num_frames), self.group)

    def add_gradients(self, model: nn.Module) -> None:
        """The gradients of the whole clip, in every process."""
        for parameter in model.parameters() if self.group is not None else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.group)

    @contextmanager
    def of(self, vae: CausalVAE) -> Iterator[None]:
        """The VAE on this process's frames, as a part of the clip; give it all of them as one chunk."""
        undo = []
        for module in vae.modules() if self.group is not None else ():
            if isinstance(module, CausalConv3d):
                undo.append(module.register_forward_pre_hook(self._receive).remove)
            elif isinstance(module, GroupNormSiLU | SpatialNormSiLU):
                norm = _group_norm if isinstance(module, GroupNormSiLU) else _spatial_norm
                module.forward = partial(norm, module, self.group)
                undo.append(partial(delattr, module, "forward"))
        try:
            yield
        finally:
            for step in undo:
                step()

    def _own(self, lengths: list[int]) -> slice:
        start = sum(lengths[: self.rank])
        return slice(start, start + lengths[self.rank])

    def _receive(self, module: nn.Module, args: tuple) -> tuple:
        return (_FromPrevious.apply(args[0], self.group), *args[1:])


def latents_of_each(num_frames: int, size: int) -> list[int]:
    """Latent frames of each of `size` processes: an odd number for the first, even ones for the others.

    So no process but the first ever has an odd number of frames, at any depth of the VAE, and the rule that the first
    frame of an odd number stands alone holds for the clip's first frame only.
    """
    if num_frames < 1 or num_frames % 8 != 1:
        raise ValueError(f"num_frames is {num_frames}; it must be 8N+1 to be split over processes")
    pairs = num_frames // 8
    if size - 1 > pairs:
        raise ValueError(f"{num_frames} frames can be split over {pairs + 1} processes at most, not {size}")
    # The first has one more latent already, so what is left over goes to the last.
    share, left = divmod(pairs, size)
    return [2 * (share + (rank >= size - left)) + (rank == 0) for rank in range(size)]


WHOLE = TimeSplit(None, 1)


class _FromPrevious(torch.autograd.Function):
    """[halo, x], whose halo becomes the last two frames of the process before; the first process keeps its own."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.mark_dirty(x)
        received = _pass_on(x[:, :, -HALO:], group, 1)
        if received is not None:
            x[:, :, :HALO] = received
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        received = _pass_on(grad[:, :, :HALO], ctx.group, -1)
        if dist.get_rank(ctx.group) > 0:
            grad[:, :, :HALO] = 0  # what stood there before was replaced
        if received is not None:
            grad[:, :, -HALO:] += received
        return grad, None


def _pass_on(x: Tensor, group: dist.ProcessGroup, by: int) -> Tensor | None:
    """Send x to the process `by` places on and return what the one as far behind sent, None where there is none."""
    link = Link(group)
    target, source, received = link.rank + by, link.rank - by, None
    sent = [link.send("halos", x.contiguous(), target)] if 0 <= target < link.size else []
    if 0 <= source < link.size:
        received = link.receive(x.shape, x, source)
    link.end(sent)
    return received


class _Added(torch.autograd.Function):
    """A sum over processes, each of which goes on with it: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Whole(torch.autograd.Function):
    """All frames, in every process."""

    @staticmethod
    def forward(ctx, own: Tensor, frames: slice, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.frames, ctx.group = frames, group
        whole = own.new_zeros(*own.shape[:2], total, *own.shape[3:])
        whole[:, :, frames] = own
        dist.all_reduce(whole, group=group)  # of a frame and zeros: exact
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[:, :, ctx.frames], None, None, None


# What the convolution before says of a norm's moments is of this process's frames alone: neither norm takes it.
def _group_norm(
    module: GroupNormSiLU, group: dist.ProcessGroup, x: Tensor, z: None, halo: None, moments: Tensor | None = None
) -> Tensor:
    return join_halo(F.silu(_normalised(x, module, group)).to(x.dtype), None, HALO)


def _spatial_norm(
    module: SpatialNormSiLU, group: dist.ProcessGroup, x: Tensor, z: Tensor, halo: None, moments: Tensor | None = None
) -> Tensor:
    y, b = module.conv_y["conv"], module.conv_b["conv"]
    scale, shift = (resize_nearest(F.conv3d(z, conv.weight, conv.bias), x.shape[2:]) for conv in (y, b))
    return join_halo(F.silu(_normalised(x, module.norm_layer, group) * scale + shift).to(x.dtype), None, HALO)


def _normalised(x: Tensor, norm: nn.GroupNorm, group: dist.ProcessGroup) -> Tensor:
    """GroupNorm whose mean and variance are those of all processes' frames; in fp32 at least."""
    values = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (norm.num_groups, -1)).flatten(2)
    own = torch.cat([values.sum(2), torch.full_like(values[:, :, 0], values.shape[2])], dim=1)
    total, count = _Added.apply(own, group)[:, :, None].chunk(2, dim=1)
    centred = values - total / count
    variance = _Added.apply(centred.square().sum(2, keepdim=True), group) / count
    y = (centred * torch.rsqrt(variance + norm.eps)).view(x.shape)
    shape = (1, -1, 1, 1, 1)
    return y * norm.weight.view(shape) + norm.bias.view(shape)
