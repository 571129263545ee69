"""How the official code schedules and samples, in plain PyTorch from its published formulas alone; nothing of cogvx.

Everything is float64, the official code's fp32 tables aside; a velocity is read with the snapped alpha, the moves are
made with the rescaled ones.
"""

import math

import torch

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()


def shifted(s):
    product = (1 - BETAS).cumprod(0)
    return product / (s + (1 - s) * product)


def rescaled(roots):  # of alphas, the cleanest first, so that the last one becomes 0 and the first one stays
    return (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])


def training_roots(s):
    return rescaled(shifted(s).sqrt())


def kept_timesteps(n):
    """The cleanest first."""
    return [int(999 - i * 999 / n + 1e-9) for i in range(n)][::-1]


def kept_roots(n, s):
    """Roots of the alphas of the n kept timesteps, the cleanest first."""
    return rescaled(shifted(s).sqrt()[kept_timesteps(n)])


def snapped(root, s):
    roots = training_roots(s)
    return min(roots.tolist(), key=lambda other: abs(other - root))


def schedule(n, s):
    """(timestep, root before, root after, root to read the velocity with) of each step, and then what is left: 1."""
    roots = [*kept_roots(n, s).flip(0).tolist(), 1.0]
    return [(t, roots[i], roots[i + 1], snapped(roots[i], s)) for i, t in enumerate(kept_timesteps(n)[::-1])]


def ddim(denoise, x, n, s):
    x = x.double()
    for i, (t, root, after, seen) in enumerate(schedule(n, s)):
        x0 = seen * x - math.sqrt(1 - seen**2) * denoise(x.float(), t, i).double()
        noise = (x - root * x0) / math.sqrt(1 - root**2)
        x = after * x0 + math.sqrt(1 - after**2) * noise
    return x


def dpmpp_2m_sde(denoise, x, n, s, draw):
    """draw: normal noise of x's shape; once in the first step, twice in the middle ones, in the last one not at all."""
    x, before, previous_shrink = x.double(), None, None
    for i, (t, root, after, seen) in enumerate(schedule(n, s)):
        x0 = seen * x - math.sqrt(1 - seen**2) * denoise(x.float(), t, i).double()
        if i == n - 1:
            return x0
        # Without logarithms: q = sigma / root, and e^-h is the q after the step over that before it, 0 from pure noise.
        q_after = math.sqrt(1 - after**2) / after
        shrink = q_after * root / math.sqrt(1 - root**2)
        noise, d = draw(), x0
        if i > 0:
            noise = draw()
            h = -math.log(shrink)
            ratio = math.inf if i == 1 else -math.log(previous_shrink) / h
            d = x0 + (x0 - before) / (2 * ratio)
        x = (
            math.sqrt((1 - after**2) / (1 - root**2)) * shrink * x
            + (1 - shrink**2) * after * d
            + math.sqrt(1 - after**2) * math.sqrt(1 - shrink**2) * noise.double()
        )
        before, previous_shrink = x0, shrink


def dpmpp_2m(denoise, x, n, s):
    x, before, previous_shrink = x.double(), None, None
    for i, (t, root, after, seen) in enumerate(schedule(n, s)):
        x0 = seen * x - math.sqrt(1 - seen**2) * denoise(x.float(), t, i).double()
        if i == n - 1:
            return x0
        shrink = math.sqrt(1 - after**2) / after * root / math.sqrt(1 - root**2)
        d = x0
        if i > 1:
            d = x0 + (x0 - before) * math.log(shrink) / (2 * math.log(previous_shrink))
        x = math.sqrt((1 - after**2) / (1 - root**2)) * x + (1 - shrink) * after * d
        before, previous_shrink = x0, shrink


def wave(scale, timestep):
    """Guidance of one step as released: 50 stands for the number of steps."""
    return 1 + scale * (1 - math.cos(math.pi * ((50 - timestep) / 50) ** 5)) / 2
