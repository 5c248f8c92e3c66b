import copy
import csv
import importlib.metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orderppl.config import build, describe
from orderppl.errors import UserError
from orderppl.models.denoisers import AntibodyDenoiser
from orderppl.models.denoisers.antibody import RESIDUES
from orderppl.unmasking import Denoiser
from orderppl.unmasking.denoiser import SplitDenoiser

DATA = Path(__file__).parents[3] / "shared" / "data" / "antibodies" / "heavy.csv"
MASK = 24
# Variable domain of the heavy chain of adalimumab (public sequence).
DOMAIN = (
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLS"
    "TASSLDYWGQGTLVTVSS"
)

try:
    importlib.metadata.version("sapiens")
except importlib.metadata.PackageNotFoundError:
    pytestmark = pytest.mark.skip(reason="the package with the antibody weights is not installed")


@pytest.fixture(scope="module")
def denoiser() -> AntibodyDenoiser:
    return AntibodyDenoiser("H")


def padded(sequences: list[str]) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    tokens = torch.full((len(sequences), width), 1)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor([4 + RESIDUES.index(residue) for residue in sequence])
        mask[row, : len(sequence)] = True
    return tokens, mask


@torch.no_grad()
def test_known_outputs(denoiser: AntibodyDenoiser) -> None:
    """Pinned after the checks on real sequences below; guards every later change of the forward."""
    assert isinstance(denoiser, Denoiser)
    assert isinstance(denoiser, SplitDenoiser)
    assert denoiser.mask_index == MASK
    # those of the checkpoint, and the embedding of the one segment that transformers wants to have
    assert sum(p.numel() for p in denoiser.parameters()) == 568_857 + 128
    tokens, mask = padded([DOMAIN])
    hidden = torch.arange(tokens.shape[1]) % 3 == 0
    log_probs = denoiser(torch.where(hidden, MASK, tokens), mask).log_softmax(-1)[0]
    right = log_probs.argmax(-1) == tokens[0]
    assert int(right[hidden].sum()) == 37  # of 41
    nats = -log_probs.gather(-1, tokens[0][:, None])[hidden].sum()
    assert nats.item() == pytest.approx(18.4526, abs=2e-3)
    assert log_probs[0, 4:9].tolist() == pytest.approx([-5.1440, -5.5878, -3.3959, -0.1211, -5.4364], abs=2e-3)


@torch.no_grad()
@pytest.mark.skipif(not DATA.exists(), reason="no antibody sequences beside the project")
def test_restores_real_human_domains(denoiser: AntibodyDenoiser) -> None:
    """15% masked, as in training: a wrong layer, position offset or frame token falls far below this."""
    with DATA.open() as file:
        rows = list(csv.DictReader(file))
    human = [r["heavy"] for r in rows if r["name"].endswith("umab") and not r["name"].endswith(("zumab", "ximab"))]
    tokens, mask = padded(human)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(tokens.shape, generator=generator)
    accuracy, nats = {}, {}
    for part in (0.15, 1.0):
        hidden = (noise < part) & mask
        log_probs = denoiser(torch.where(hidden, MASK, tokens), mask).log_softmax(-1)
        accuracy[part] = (log_probs.argmax(-1) == tokens)[hidden].double().mean().item()
        nats[part] = -log_probs.gather(-1, tokens.clamp(min=4)[..., None])[hidden].mean().item()
    assert accuracy[0.15] > 0.87
    assert nats[0.15] < 0.6
    assert 2.4 < nats[1.0] < 3.0  # it never saw a fully masked domain


@torch.no_grad()
def test_padding_and_other_rows_change_nothing(denoiser: AntibodyDenoiser) -> None:
    # float32 kernels round by the shape of a batch, up to 3e-5 on some CPUs
    denoiser = copy.deepcopy(denoiser).double()
    tokens, mask = padded([DOMAIN, DOMAIN[:60], DOMAIN[:1]])
    tokens[:, ::4] = torch.where(mask[:, ::4], MASK, tokens[:, ::4])
    together = denoiser(tokens, mask)
    for row in range(3):
        alone = denoiser(tokens[row][mask[row]][None], torch.ones(1, int(mask[row].sum()), dtype=torch.bool))
        torch.testing.assert_close(together[row][mask[row]], alone[0], atol=1e-9, rtol=1e-9)
    # padding in front and in the middle, whatever stands there
    inner = torch.cat([torch.full((1, 3), 7), tokens[1:2, :20], torch.full((1, 2), MASK), tokens[1:2, 20:60]], 1)
    inner_mask = torch.tensor([[False] * 3 + [True] * 20 + [False] * 2 + [True] * 40])
    moved = denoiser(inner, inner_mask)[0][inner_mask[0]]
    torch.testing.assert_close(moved, together[1][mask[1]], atol=1e-9, rtol=1e-9)
    # an empty row is finite where a residue may stand
    empty = denoiser(inner, torch.zeros_like(inner_mask))
    assert empty[..., 4:24].isfinite().all()


@torch.no_grad()
def test_only_residues_are_possible(denoiser: AntibodyDenoiser) -> None:
    tokens, mask = padded([DOMAIN])
    logits = denoiser(torch.full_like(tokens, MASK), mask)
    assert logits.shape[-1] == denoiser.vocab_size == 25
    assert (logits[..., [0, 1, 2, 3, MASK]] == -torch.inf).all()
    assert logits[..., 4:24].isfinite().all()


def test_is_frozen_until_it_is_trained_and_stays_in_evaluation_mode(denoiser: AntibodyDenoiser) -> None:
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    trained = copy.deepcopy(denoiser).requires_grad_(True).train()
    assert not any(module.training for module in trained.network.modules())
    tokens = torch.randint(4, 24, (3, 10), generator=torch.Generator().manual_seed(0))
    logits = trained(torch.where(tokens < 14, MASK, tokens), torch.ones(3, 10, dtype=torch.bool))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("key.bias"):  # cancels in the softmax
            assert parameter.grad.abs().sum() > 0, name


def test_is_described_by_its_arguments(denoiser: AntibodyDenoiser) -> None:
    spec = describe(AntibodyDenoiser("L"))
    assert spec == {"class_path": "orderppl.models.denoisers.AntibodyDenoiser", "init_args": {"chain": "L"}}
    tokens, mask = padded([DOMAIN[:20]])
    again = build(describe(denoiser))
    assert torch.equal(again(tokens, mask), denoiser(tokens, mask))


def test_light_chain_has_its_own_weights(denoiser: AntibodyDenoiser) -> None:
    light = AntibodyDenoiser("L")
    assert light.max_length is not None
    assert denoiser.max_length is not None
    assert light.max_length < denoiser.max_length
    assert not torch.equal(light.head.bias, denoiser.head.bias)  # type: ignore[arg-type]


def test_letters_and_ids(denoiser: AntibodyDenoiser) -> None:
    tokenizer = denoiser.tokenizer
    assert tokenizer is not None
    assert (tokenizer.pad_index, tokenizer.mask_index, tokenizer.eos_index, tokenizer.vocab_size) == (1, MASK, 2, 25)
    assert tokenizer.encode(RESIDUES) == list(range(4, 24))
    assert tokenizer.decode(range(4, 24)) == RESIDUES
    assert tokenizer.frame == ((), ())  # the denoiser puts it around


def test_refuses_long_domains_other_chains_and_a_missing_package(
    denoiser: AntibodyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="a canvas of 200 tokens exceeds the model's 142"):
        denoiser(torch.full((1, 200), 4), torch.ones(1, 200, dtype=torch.bool))
    with pytest.raises(UserError, match="unknown antibody chain 'K'"):
        AntibodyDenoiser("K")  # type: ignore[arg-type]

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match=r"is missing; run: pip install --no-deps sapiens==1\.0\.5"):
        AntibodyDenoiser("H")
