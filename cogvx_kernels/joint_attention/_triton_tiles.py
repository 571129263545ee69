"""How large the tiles of the Triton kernels are, by dtype, head width and GPU."""

import torch
import triton


def options(kernel: str, dtype: torch.dtype, width: int, capability: int) -> dict:
    """The compile-time arguments of a kernel; capability is 90 for sm_90, and 0 for the interpreter."""
    block = max(triton.next_power_of_2(width), 16)
    chunk, stages, backward = block, 2, kernel != "forward"
    # Rows of the tile that a program owns, rows of the tiles that it visits: as many as registers hold.
    own, visited, warps = 128, 64 if width <= 64 else 32, 8
    if capability == 0:  # as many of each: how numpy sums depends on the shape
        own, visited, chunk = 32, 32, min(block, 32) if dtype == torch.float32 else block
    elif dtype == torch.float32:
        own, visited, chunk, warps, stages = 32, 16, 16, 8 if backward else 4, 1
    elif backward and width > 64:
        own, visited, chunk = 64, 32, block if capability in (90, 100) else 64
    elif capability == 90:
        visited = visited if backward else 2 * visited
    elif backward:
        visited = 32
    else:
        stages = 3
    queries, keys = (visited, own) if kernel == "keys_backward" else (own, visited)
    sizes = {"QUERIES": queries, "KEYS": keys, "WIDTH": width, "BLOCK": block, "CHUNK": chunk}
    return sizes | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
