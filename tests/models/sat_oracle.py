"""The networks as the official code computes them, in plain PyTorch from the published facts alone; nothing of cogvx.

`w` are weights under the official code's names, B batch, T H W frames or patches. Whatever dtype the weights are of is
computed in; positions are fp32 tables, as there.
"""

import math

import torch
import torch.nn.functional as F


class Transformer:
    """`patch` is 1 x 2 x 2 or 2 x 2 x 2, `trained` the grid of patches T, H, W of the trained videos."""

    def __init__(self, w, heads, patch, trained, kind, last_eps=1e-6):
        self.w, self.heads, self.patch, self.trained, self.last_eps = w, heads, patch, trained, last_eps
        self.rotates, self.has_ofs = kind != "2b", "ofs_embed.0.weight" in w
        self.layers = sum(name.endswith("dense.weight") for name in w)

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name, eps):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def embedded(self, value, name):  # cosines first
        width = self.w[f"{name}.0.weight"].shape[1]
        angles = value[:, None].float() * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        x = torch.cat([angles.cos(), angles.sin()], 1).to(self.w[f"{name}.0.weight"])
        return self.linear(F.silu(self.linear(x, f"{name}.0")), f"{name}.2")

    def patches(self, latents):  # [B, C, T q, H p, W p] -> [B, T H W, D]
        b, c = latents.shape[:2]
        q, p, _ = self.patch
        t, h, w = (n // m for n, m in zip(latents.shape[2:], self.patch, strict=True))
        weight = self.w["mixins.patch_embed.proj.weight"]
        x = latents.reshape(b, c, t, q, h, p, w, p).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t * h * w, -1)
        return F.linear(x, weight.flatten(1), self.w["mixins.patch_embed.proj.bias"]), (t, h, w)

    def added(self, num_text, count, width):
        """To text and vision: rows of a flat table of the trained grid, whatever place they had there."""
        if "mixins.pos_embed.pos_embedding" in self.w:
            table = self.w["mixins.pos_embed.pos_embedding"][0].to(self.w["mixins.patch_embed.proj.weight"])
            rows = len(table) - math.prod(self.trained)
            return table[:num_text], table[rows : rows + count]
        if self.rotates:
            return 0, 0

        def sincos(n, size, scale):
            angles = torch.arange(n).double()[:, None] / scale / 10000 ** (torch.arange(size // 2) / (size / 2))
            return torch.cat([angles.sin(), angles.cos()], 1)

        t, h, w = self.trained
        time, rows, columns = sincos(t, width // 4, 1), *(sincos(n, width * 3 // 8, 1.875) for n in (h, w))
        flat = [torch.cat([time[i], columns[k], rows[j]]) for i in range(t) for j in range(h) for k in range(w)]
        return 0, torch.stack(flat)[:count].to(self.w["mixins.patch_embed.proj.weight"])

    def angles(self, grid, width):
        """Cosines and sines [T H W, E], whole steps from 0 in every grid, rounded to the dtype of the weights."""

        def turns(size):
            return 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)

        t, h, w = (torch.arange(n).float() for n in grid)
        parts = (
            (t[:, None, None, None] * turns(width // 4)).expand(*grid, -1),
            (h[None, :, None, None] * turns(width * 3 // 8)).expand(*grid, -1),
            (w[None, None, :, None] * turns(width * 3 // 8)).expand(*grid, -1),
        )
        angles = torch.cat(parts, -1).flatten(0, 2).repeat_interleave(2, -1)
        return [f(angles).to(self.w["mixins.patch_embed.proj.weight"]) for f in (torch.cos, torch.sin)]

    def attention(self, x, i, num_text, turn):
        q, k, v = self.linear(x, f"transformer.layers.{i}.attention.query_key_value").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q = self.norm(q, f"mixins.adaln_layer.query_layernorm_list.{i}", 1e-6)
        k = self.norm(k, f"mixins.adaln_layer.key_layernorm_list.{i}", 1e-6)
        if turn is not None:
            q, k = (torch.cat([y[:, :, :num_text], turn(y[:, :, num_text:])], 2) for y in (q, k))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.linear((scores @ v).transpose(1, 2).flatten(2), f"transformer.layers.{i}.attention.dense")

    def __call__(self, latents, text, timestep):
        vision, grid = self.patches(latents)
        text = self.linear(text, "mixins.patch_embed.text_proj")
        num_text, count = text.shape[1], vision.shape[1]
        to_text, to_vision = self.added(num_text, count, text.shape[2])
        x = torch.cat([text + to_text, vision + to_vision], 1)
        emb = self.embedded(timestep, "time_embed")
        if self.has_ofs:
            emb = emb + self.embedded(torch.full((1,), 2.0), "ofs_embed")
        turn = None
        if self.rotates:
            cos, sin = self.angles(grid, text.shape[2] // self.heads)

            def turn(y):
                return y * cos + torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2) * sin

        which = (torch.arange(num_text + count) < num_text)[None, :, None]
        for i in range(self.layers):
            # Vision attention, vision MLP, text attention, text MLP; shift, scale, gate of each.
            parts = self.linear(F.silu(emb), f"mixins.adaln_layer.adaLN_modulations.{i}.1")[:, None].chunk(12, -1)
            at, mlp = ([torch.where(which, parts[6 + j], parts[j]) for j in (k, k + 1, k + 2)] for k in (0, 3))
            y = self.norm(x, f"transformer.layers.{i}.input_layernorm", 1e-5) * (1 + at[1]) + at[0]
            x = x + at[2] * self.attention(y, i, num_text, turn)
            y = self.norm(x, f"transformer.layers.{i}.post_attention_layernorm", 1e-5) * (1 + mlp[1]) + mlp[0]
            y = F.gelu(self.linear(y, f"transformer.layers.{i}.mlp.dense_h_to_4h"), approximate="tanh")
            x = x + mlp[2] * self.linear(y, f"transformer.layers.{i}.mlp.dense_4h_to_h")
        shift, scale = self.linear(F.silu(emb), "mixins.final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
        x = self.norm(x[:, num_text:], "transformer.final_layernorm", 1e-5)
        x = self.norm(x, "mixins.final_layer.norm_final", self.last_eps) * (1 + scale) + shift
        x = self.linear(x, "mixins.final_layer.linear").unflatten(1, grid)
        b, (t, h, w), (q, p, _) = len(x), grid, self.patch
        return x.reshape(b, t, h, w, -1, q, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, -1, t * q, h * p, w * p)


class VAE:
    """`halves_time` levels of the encoder, from the finest, halve time too; the decoder mirrors them."""

    def __init__(self, w, groups, halves_time=2):
        self.w, self.groups, self.halves_time, self.halos = w, groups, halves_time, {}
        self.levels = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("encoder.down."))

    def has(self, name):
        return f"{name}.weight" in self.w

    def conv(self, x, name):  # causal in time: two copies of the first frame, or what the chunk before ended with
        halo = self.halos.get(name)
        x = torch.cat([x[:, :, :1]] * 2 + [x] if halo is None else [halo, x], 2)
        self.halos[name] = x[:, :, -2:]
        return F.conv3d(x, self.w[f"{name}.conv.weight"], self.w[f"{name}.conv.bias"], padding=(0, 1, 1))

    def frames(self, x, f):
        y = f(x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (len(x), -1)).transpose(1, 2)

    def norm(self, x, z, name):
        plain = name if z is None else f"{name}.norm_layer"
        y = F.group_norm(x, self.groups, self.w[f"{plain}.weight"], self.w[f"{plain}.bias"], 1e-6)
        if z is not None:
            if x.shape[2] > 1 and x.shape[2] % 2:
                first = F.interpolate(z[:, :, :1], (1, *x.shape[3:]))
                z = torch.cat([first, F.interpolate(z[:, :, 1:], (x.shape[2] - 1, *x.shape[3:]))], 2)
            else:
                z = F.interpolate(z, x.shape[2:])
            by, on = (F.conv3d(z, self.w[f"{name}.conv_{k}.conv.weight"], self.w[f"{name}.conv_{k}.conv.bias"])
                      for k in "yb")  # fmt: skip
            y = y * by + on
        return F.silu(y)

    def block(self, x, z, name):
        y = self.conv(self.norm(x, z, f"{name}.norm1"), f"{name}.conv1")
        y = self.conv(self.norm(y, z, f"{name}.norm2"), f"{name}.conv2")
        short = f"{name}.nin_shortcut"
        return y + (F.conv3d(x, self.w[f"{short}.weight"], self.w[f"{short}.bias"]) if self.has(short) else x)

    def blocks(self, x, z, level):
        i = 0
        while f"{level}.block.{i}.conv1.conv.weight" in self.w:
            x, i = self.block(x, z, f"{level}.block.{i}"), i + 1
        return x

    def middle(self, x, z, half):
        return self.block(self.block(x, z, f"{half}.mid.block_1"), z, f"{half}.mid.block_2")

    def encode(self, video):
        """Mean and log-variance of a clip that is taken whole."""
        self.halos = {}
        x = self.conv(video, "encoder.conv_in")
        for i in range(self.levels):
            x = self.blocks(x, None, f"encoder.down.{i}")
            name = f"encoder.down.{i}.downsample.conv"
            if not self.has(name):
                continue
            if i < self.halves_time and x.shape[2] > 1:
                alone = x.shape[2] % 2
                x = torch.cat([x[:, :, :alone], (x[:, :, alone::2] + x[:, :, alone + 1 :: 2]) / 2], 2)
            weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
            x = self.frames(x, lambda y, w=weight, b=bias: F.conv2d(F.pad(y, (0, 1, 0, 1)), w, b, stride=2))
        x = self.middle(x, None, "encoder")
        return self.conv(self.norm(x, None, "encoder.norm_out"), "encoder.conv_out").chunk(2, 1)

    def decode(self, z, lengths, four_each):
        """Chunk by chunk; the first frame of an odd chunk stays alone where time doubles, unless it is four each."""
        self.halos = {}
        return torch.cat([self.decode_chunk(chunk, four_each) for chunk in z.split(lengths, 2)], 2)

    def decode_chunk(self, z, four_each):
        x = self.middle(self.conv(z, "decoder.conv_in"), z, "decoder")
        for i in reversed(range(self.levels)):
            x = self.blocks(x, z, f"decoder.up.{i}")
            name = f"decoder.up.{i}.upsample.conv"
            if not self.has(name):
                continue
            x = self.frames(x, lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3))
            if i > self.levels - 1 - self.halves_time:
                alone = x.shape[2] % 2 and not four_each
                x = torch.cat([x[:, :, :alone], x[:, :, alone:].repeat_interleave(2, 2)], 2)
            weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
            x = self.frames(x, lambda y, w=weight, b=bias: F.conv2d(y, w, b, padding=1))
        return self.conv(self.norm(x, z, "decoder.norm_out"), "decoder.conv_out")


def decode_lengths(num_latents):
    """As published: of the counts that the released models make."""
    return {13: [3] + [2] * 5, 21: [3] + [2] * 9, 41: [5] + [4] * 9}[num_latents]
