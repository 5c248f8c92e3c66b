import itertools
from types import SimpleNamespace

import pytest
import torch

from orderppl.errors import UserError
from orderppl.inference.annealing import Anneal, set_dial


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_moves_from_start_to_end_and_stays(shape: str) -> None:
    anneal = Anneal(0.5, 0.1, 100, shape)
    values = [anneal(update) for update in range(150)]
    assert values[0] == pytest.approx(0.5)
    assert values[100:] == [0.1] * 50
    assert all(a > b for a, b in itertools.pairwise(values[:101]))
    middle = {"linear": 0.3, "cosine": 0.3, "exponential": (0.5 * 0.1) ** 0.5}[shape]
    assert values[50] == pytest.approx(middle)


def test_no_length_gives_the_end_at_once() -> None:
    assert Anneal(1.0, 0.2, 0)(0) == 0.2


@pytest.mark.parametrize(
    "arguments", [(1.0, 0.0, 10, "exponential"), (1.0, 0.0, -1), (1.0, 0.0, 5, "steps"), (float("nan"), 1.0, 5)]
)
def test_refuses_bad_shapes(arguments: tuple[object, ...]) -> None:
    with pytest.raises(UserError):
        Anneal(*arguments)


def test_sets_numbers_and_buffers_by_dotted_name() -> None:
    model = SimpleNamespace(prior=SimpleNamespace(price=0.0), scale=torch.ones(()))
    buffer = model.scale
    set_dial({"model": model}, "model.prior.price", 0.3)
    set_dial({"model": model}, "model.scale", 0.25)
    assert model.prior.price == 0.3
    assert model.scale is buffer
    assert buffer.item() == 0.25


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("guide.temperature", "names no dial of model"),
        ("model", "names no dial"),
        ("model.prior.price", "model.prior .* has no attribute 'price'"),
        ("model.prior", "is a SimpleNamespace, not a number"),
        ("model.flag", "is a bool, not a number"),
    ],
)
def test_refuses_names_of_nothing(name: str, problem: str) -> None:
    model = SimpleNamespace(prior=SimpleNamespace(), flag=True)
    with pytest.raises(UserError, match=problem):
        set_dial({"model": model}, name, 1.0)
