"""What a user's own denoiser gives is checked where it is called, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orderppl import Batch, UserError, decode
from orderppl.decoding.decode import follow
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.policies import Threshold

GIVES: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda state: torch.full((*state.shape, 4), torch.nan),
    "nothing possible": lambda state: torch.full((*state.shape, 4), -torch.inf),
    "other classes": lambda state: torch.zeros(*state.shape, 3),
    "None": lambda state: None,
    "no classes": lambda state: torch.zeros(state.shape),
    "integers": lambda state: torch.zeros(*state.shape, 4, dtype=torch.long),
    "a tuple": lambda state: (torch.zeros(*state.shape, 4),),
}


class Own(nn.Module):
    """Gives what it is told to."""

    vocab_size, mask_index = 4, 4

    def __init__(self, gives: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, state: Tensor, attention_mask: Tensor) -> Any:
        return self.gives(state)


@pytest.mark.parametrize("name", GIVES)
def test_what_it_gives_is_checked(name: str) -> None:
    denoiser: Any = Own(GIVES[name])
    for action in (
        lambda: decode(denoiser, Threshold(0.5), torch.full((2, 6), 4), max_steps=3),
        lambda: follow(Threshold(0.5), denoiser, Batch(torch.zeros(2, 6, dtype=torch.long)), 3),
    ):
        with pytest.raises(UserError, match="^denoiser: ") as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [{"layers": 10**12}, {"width": 10**8}])
def test_sizes_that_no_machine_holds_are_refused_before_memory_is_asked_for(sizes: dict[str, int]) -> None:
    torch.set_default_device("meta")
    try:
        with pytest.raises(UserError, match="are too many numbers"):
            TransformerDenoiser(5, 4, **sizes)
    finally:
        torch.set_default_device(None)
