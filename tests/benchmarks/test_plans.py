"""The README's table of plans is what its command makes."""

import pytest
from plans import BUDGETS, HEADER, MODELS, README, rows, written


def test_rows_of_one_model_take_the_place_of_their_own_alone():
    before = written(README.read_text(), {model: [f"| {model} | old |"] for model in MODELS})
    after = written(before, {"5b": ["| 5b | new |", "| 5b | newer |"]})
    assert after == before.replace("| 5b | old |", "| 5b | new |\n| 5b | newer |")
    assert after.count(HEADER[0]) == 1 and written(after, {}) == after


@pytest.mark.soak  # minutes of one core each
@pytest.mark.parametrize("model", MODELS)
def test_the_table_is_what_is_predicted(model):
    made = list(rows(model))
    assert len(made) > len(BUDGETS)
    assert written(README.read_text(), {model: made}) == README.read_text()
