"""Weights that processes hold between them: of every tensor, its gradient, its average and its states a slice each.

A part of the model comes together in every process when it computes, forwards and again backwards, and goes apart
behind it. Nothing on disk shows that: a state holds whole tensors.

Source: "PyTorch FSDP" (arXiv 2304.11277), through `torch.distributed.fsdp.fully_shard`.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.transformer import ExpertTransformer
from .options import TrainingError
from .ranks import Ranks


def num_sharing(shard: int, ranks: Ranks) -> int:
    """How many processes hold one copy of the weights between them; 0 stands for all.

    Raises TrainingError for a number into groups of which the processes cannot be divided.
    """
    count = shard or ranks.size
    if ranks.size % count:
        wanted = f"it must divide the number of processes, which is {ranks.size}; 0 is all of them"
        raise TrainingError(f"shard is {shard}; {wanted}")
    return count


def placed(model: ExpertTransformer, device: torch.device, ranks: Ranks, shard: int) -> ExpertTransformer:
    """A model on a device: whole, or in each of the processes that share it out a slice of every weight.

    With more processes than `shard`, every group of so many holds a copy.
    """
    count = num_sharing(shard, ranks)
    if count == 1:
        return model.to(device)
    # It says so of every result that is a view, which here nobody changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    copies = ranks.size // count
    sizes = (copies, count) if copies > 1 else (count,)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "slice")[-len(sizes) :])
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            fully_shard(norm.linear, mesh=mesh)  # those of all blocks compute first, before any block does
        _share_out(block, mesh)
    _share_out(model, mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the loss is a process's part of a mean already: gradients are to be added
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


def _share_out(module: nn.Module, mesh: Any) -> None:
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "run")


def is_shared_out(model: nn.Module) -> bool:
    """Whether processes hold the model between them, so that all must compute equally often."""
    return isinstance(model, FSDPModule)


def whole(tree: Any, keep: bool, copy: bool = False) -> Any:
    """A state whose sharded tensors are whole, on the host; where they are not to be kept, None is in their place.

    copy: all others on the host too, in memory of their own, so that nothing here is changed by a later step. All
    processes must call it.
    """
    if isinstance(tree, DTensor):
        full = tree.full_tensor()  # put together, in memory of its own, unless this process holds all of it
        return _on_host(full, copy and full.data_ptr() == tree.to_local().data_ptr()) if keep else None
    if isinstance(tree, Tensor) and copy:
        return _on_host(tree, copy) if keep else None
    if isinstance(tree, dict):
        return {key: whole(value, keep, copy) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole(value, keep, copy) for value in tree]
    return tree


def _on_host(tensor: Tensor, copy: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=copy)


def slice_like(held: Tensor, value: Tensor) -> Tensor:
    """Of a whole tensor what this process holds of `held`; all of it where that is whole too."""
    if not isinstance(held, DTensor) or value.shape != held.shape:
        return value
    return distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)


class States:
    """An optimiser as a part of a run's state, which is whole whatever this process holds of it.

    Its options, such as betas and weight decay, stay those that it was made with: a run may go on with others.
    """

    def __init__(self, optimiser: torch.optim.Optimizer):
        self.optimiser = optimiser

    def state_dict(self) -> dict:
        return self.optimiser.state_dict()

    def load_state_dict(self, state: dict) -> None:
        weights = [weight for group in self.optimiser.param_groups for weight in group["params"]]
        states = {
            index: {name: slice_like(weights[index], value) for name, value in own.items()}
            for index, own in state["state"].items()
        }
        groups = [{**group} for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict({**state, "state": states})
        for group, own in zip(self.optimiser.param_groups, groups, strict=True):
            group.update(own)
