"""A 3D patch discriminator: a grid of opinions on whether a clip is real."""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Logits [B, 1, T', H', W'] of a video [B, 3, T, H, W]; higher is more real. Takes one frame or more."""

    def __init__(self, width: int = 32, num_layers: int = 3):
        super().__init__()
        widths = [3, *(width * min(2**i, 8) for i in range(num_layers))]
        self.convs = nn.ModuleList(
            nn.Conv3d(widths[i], widths[i + 1], (3, 4, 4), stride=(1 if i == 0 else 2, 2, 2), padding=1)
            for i in range(num_layers)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) if i > 0 else nn.Identity() for i, w in enumerate(widths[1:]))
        self.head = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        x = video
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.head(x)
