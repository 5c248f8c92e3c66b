import importlib.metadata

import pytest
import torch

from orderppl.config import build, describe
from orderppl.models.denoisers.receptor import ReceptorDenoiser, ReceptorTokenizer
from orderppl.unmasking import Denoiser

PAIR = "CAVRDSNYQLIW:CASSLGQAYEQYF"

try:
    importlib.metadata.version("sceptr")
except importlib.metadata.PackageNotFoundError:
    pytestmark = pytest.mark.skip(reason="the package with the receptor weights is not installed")


@pytest.fixture(scope="module")
def denoiser() -> ReceptorDenoiser:
    return ReceptorDenoiser()


@torch.no_grad()
def test_known_outputs(denoiser: ReceptorDenoiser) -> None:
    """Pinned after a comparison with the code of the package itself, which agreed to 4e-6."""
    assert isinstance(denoiser, Denoiser)
    assert sum(p.numel() for p in denoiser.parameters()) == 152_852
    tokens = torch.tensor([ReceptorTokenizer().encode(PAIR)])
    hidden = (torch.arange(tokens.shape[1]) % 3 == 0) & (tokens[0] != ReceptorTokenizer.between_index)
    logits = denoiser(torch.where(hidden, denoiser.mask_index, tokens), torch.ones_like(tokens))[0]
    assert logits.shape[-1] == denoiser.vocab_size == 23
    assert (logits[:, :3] == -torch.inf).all() and logits[:, 3:].isfinite().all()
    log_prob = logits.log_softmax(-1).gather(-1, tokens[0][:, None])[hidden].sum()
    assert log_prob.item() == pytest.approx(-4.0945, abs=2e-3)


@torch.no_grad()
def test_padding_and_other_rows_change_nothing(denoiser: ReceptorDenoiser) -> None:
    tokenizer = ReceptorTokenizer()
    first, second = (torch.tensor(tokenizer.encode(text)) for text in (PAIR, "CF:CASSF"))
    state = torch.full((2, len(first) + 2), 7)
    attended = torch.zeros_like(state, dtype=torch.bool)
    state[0, : len(first)], attended[0, : len(first)] = first, True
    place = torch.tensor([1, 2, 5, 6, 7, 9, 10, 11])  # padding in front and inside
    state[1, place], attended[1, place] = second, True
    state[1, 7] = denoiser.mask_index
    together = denoiser(state, attended)
    for row in range(2):
        alone = denoiser(state[row][attended[row]][None], torch.ones(1, int(attended[row].sum())))
        torch.testing.assert_close(together[row][attended[row]], alone[0], atol=1e-5, rtol=1e-5)
    assert denoiser(state, torch.zeros_like(attended))[..., 3:].isfinite().all()


def test_is_described_by_its_name(denoiser: ReceptorDenoiser) -> None:
    again = build(describe(denoiser))
    tokens = torch.tensor([denoiser.tokenizer.encode(PAIR)])
    assert torch.equal(again(tokens, torch.ones_like(tokens)), denoiser(tokens, torch.ones_like(tokens)))
    assert denoiser.tokenizer.decode(tokens[0].tolist()) == PAIR
