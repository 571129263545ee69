"""What a process that shares weights out keeps and gives; that runs then compute the same is in test_ranks.py."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from cogvx.train import checkpoint
from cogvx.train.finetuning import Optimiser
from cogvx.train.optim import adamw
from cogvx.train.options import TrainingError
from cogvx.train.ranks import ALONE, Ranks
from cogvx.train.shards import States, num_sharing, slice_like, whole


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_number_that_shares_divides_the_processes():
    eight = Ranks()
    eight.size = 8
    assert [num_sharing(shard, eight) for shard in (0, 1, 2, 8)] == [8, 1, 2, 8] and num_sharing(0, ALONE) == 1
    for shard, ranks in ((3, eight), (16, eight), (2, ALONE)):
        with pytest.raises(TrainingError, match=f"shard is {shard}; it must divide the number of processes"):
            num_sharing(shard, ranks)


def test_a_state_is_whole_where_it_is_kept(mesh):
    full = torch.arange(6.0).view(3, 2)
    held = slice_like(DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)]), full)
    tree = {"a": held, "b": [full, {"c": held, "step": 3}]}
    kept, left = whole(tree, keep=True), whole(tree, keep=False)
    assert type(kept["a"]) is torch.Tensor and torch.equal(kept["a"], full)
    assert torch.equal(kept["b"][1]["c"], full) and kept["b"][1]["step"] == 3 and kept["b"][0] is full
    assert left["a"] is None and left["b"][1]["c"] is None and left["b"][0] is full


def test_a_copy_is_in_memory_of_its_own_and_is_not_copied_again_to_be_written(mesh, tmp_path, monkeypatch):
    held = slice_like(DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)]), torch.ones(3, 2))
    tree = {"a": held, "b": [torch.ones(2), {"step": 3}]}
    copied, written = whole(tree, keep=True, copy=True), []
    held.to_local().add_(1), tree["b"][0].add_(1)  # the next step
    assert torch.equal(copied["a"], torch.ones(3, 2)) and torch.equal(copied["b"][0], torch.ones(2))
    assert whole(tree, keep=False, copy=True) == {"a": None, "b": [None, {"step": 3}]}
    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, file: (written.append(tensors), save(tensors, file)))
    with checkpoint.Saver() as saver:
        saver.save(tmp_path, 1, {"model": copied}, copy=False)
    assert {each.data_ptr() for each in written[0].values()} == {copied["a"].data_ptr(), copied["b"][0].data_ptr()}
    assert torch.equal(checkpoint.load_state(tmp_path)[1]["model"]["a"], torch.ones(3, 2))


@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimiser_goes_on_with_its_own_options(bits):
    others, own = Optimiser(0.1, (0.5, 0.9), 1e-3, 0.3, bits=bits), Optimiser(0.2, (0.9, 0.99), 1e-6, 0.01, bits=bits)
    weights = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    saved, resumed = (adamw([weight], rates) for weight, rates in zip(weights, (others, own), strict=True))
    before = {name: value for name, value in resumed.param_groups[0].items() if name != "params"}
    weights[0].grad = torch.linspace(-1, 1, 4096).view(64, 64)
    saved.step()
    States(resumed).load_state_dict(States(saved).state_dict())
    (group,) = resumed.param_groups
    assert group["params"][0] is weights[1] and {name: group[name] for name in before} == before
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.99), 1e-6, 0.01)
    moments = [each.state_dict()["state"][0]["exp_avg"] for each in (saved, resumed)]
    numbers = [moment["codes"] if bits == 8 else moment for moment in moments]
    assert len(numbers[0].unique()) > 50 and torch.equal(*numbers)


def test_an_optimisers_whole_states_are_cut_as_its_weights_are(mesh):
    weight = torch.nn.Parameter(slice_like(DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)]), torch.ones(3, 2)))
    plain = torch.nn.Parameter(torch.ones(3, 2))
    optimisers = [torch.optim.AdamW([each], 0.1, fused=True) for each in (plain, weight)]
    plain.grad = torch.arange(6.0).view(3, 2)
    optimisers[0].step()
    States(optimisers[1]).load_state_dict(optimisers[0].state_dict())
    average = optimisers[1].state[weight]["exp_avg"]
    assert isinstance(average, DTensor) and average.placements == weight.placements
    gathered = whole(States(optimisers[1]).state_dict(), keep=True)["state"][0]
    for name, value in optimisers[0].state[plain].items():
        assert torch.equal(gathered[name], value), name
