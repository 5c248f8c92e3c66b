import itertools
from types import SimpleNamespace

import pytest
import torch

from orderppl.errors import UserError
from orderppl.inference.annealing import Anneal, set_number


def test_moves_from_start_to_end_and_stays() -> None:
    anneal = Anneal(0.5, 0.1, 100)
    values = [anneal(update) for update in range(150)]
    assert values[0] == pytest.approx(0.5)
    assert values[100:] == [0.1] * 50
    assert all(a > b for a, b in itertools.pairwise(values[:101]))
    assert values[50] == pytest.approx(0.3)


def test_no_length_gives_the_end_at_once() -> None:
    assert Anneal(1.0, 0.2, 0)(0) == 0.2


@pytest.mark.parametrize("arguments", [(1.0, 0.0, -1), (float("nan"), 1.0, 5), (0.0, float("inf"), 5)])
def test_refuses_bad_changes(arguments: tuple[float, float, int]) -> None:
    with pytest.raises(UserError):
        Anneal(*arguments)


def test_sets_numbers_and_buffers_by_dotted_name() -> None:
    model = SimpleNamespace(policy=SimpleNamespace(temperature=0.0), scale=torch.ones(()))
    buffer = model.scale
    set_number({"model": model}, "model.policy.temperature", 0.3)
    set_number({"model": model}, "model.scale", 0.25)
    assert model.policy.temperature == 0.3
    assert model.scale is buffer
    assert buffer.item() == 0.25


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("guide.temperature", "names no number of model"),
        ("model", "names no number"),
        ("model.policy.price", "model.policy .* has no attribute 'price'"),
        ("model.policy", "is a SimpleNamespace, not a number"),
        ("model.flag", "is a bool, not a number"),
    ],
)
def test_refuses_names_of_nothing(name: str, problem: str) -> None:
    model = SimpleNamespace(policy=SimpleNamespace(), flag=True)
    with pytest.raises(UserError, match=problem):
        set_number({"model": model}, name, 1.0)
