import pytest
import torch

from cogvx.train.average import Average
from cogvx.train.log import Log
from cogvx.train.optim import cosine


def test_the_average_of_a_worked_row():
    weight = torch.nn.Parameter(torch.tensor([0.0], dtype=torch.bfloat16))
    average = Average({"w": weight}, 0.5)
    for value in (1.0, 2.0, 4.0):
        weight.data.fill_(value)
        average.update()
    assert average.state_dict()["w"].item() == 0.125 * 1 + 0.25 * 2 + 0.5 * 4
    average.swap()
    assert weight.item() == 2.625 and average.state_dict()["w"].item() == 4.0
    average.swap()
    assert weight.item() == 4.0 and average.state_dict()["w"].item() == 2.625
    with pytest.raises(ValueError, match="decay is 1"):
        Average({}, 1.0)


def test_the_rate_rises_falls_as_a_cosine_and_ends_at_the_least():
    assert [cosine(i, 10, 4) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine(4, 10, 4) == 1.0 and cosine(7, 10, 4) == pytest.approx(0.5) and cosine(10, 10, 4) == 0.0
    assert cosine(10, 10, 4, 0.1) == pytest.approx(0.1) and cosine(7, 10, 4, 0.1) == pytest.approx(0.55)


def test_the_log_forgets_what_came_after_the_saved_step(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with Log(file, 2) as log:
        log.write({"step": 3, "loss": 0.5})
        log.write({"step": 4, "loss": float("nan"), "gradient": float("-inf")})
    text = '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n{"step": 4, "loss": null, "gradient": null}\n'
    assert file.read_text() == text


def test_tensorboard_gets_the_same_numbers_and_forgets_what_came_later(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (1, 3):  # the second run goes on where the state of step 2 was saved
        with Log(tmp_path / "log.jsonl", first - 1, tensorboard=True) as log:
            for step in range(first, first + 4):
                log.write({"step": step, "loss": step / first})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["loss"]
    assert [(each.step, each.value) for each in board.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), *((step, pytest.approx(step / 3)) for step in range(3, 7))]  # fmt: skip
