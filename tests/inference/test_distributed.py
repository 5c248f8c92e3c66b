"""Two processes against one: the same parameters and losses, whatever program, batch or interruption.

Run by a launcher, this file is what each process does: all cases, one after another.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro
import pytest
import torch
from torch import Tensor, nn

from orderppl import fit
from orderppl.errors import UserError
from orderppl.files import load_weights, save_weights
from orderppl.guides import MeanFieldGuide, PolicyGuide, RenormalisedScoreGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.trainer import FitResult, TrainSettings, train
from orderppl.models import LearnedPolicy, PolicyNetwork, SequenceEncoder, UnmaskingModel
from orderppl.models.denoisers import TransformerDenoiser, train_denoiser
from orderppl.policies import RandomSteps, Ranked, Smoothed
from orderppl.unmasking import Batch

T, V = 3, 4
UPDATES = 6  # two epochs


def ragged(seed: int) -> Batch:
    """Seven rows of 2 to 6 tokens after prompts of 1 to 3: batches of 3, 3 and 1."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.randint(2, 7, (7, 1), generator=generator)
    prompt = torch.arange(3) >= torch.randint(0, 3, (7, 1), generator=generator)
    tokens = torch.randint(0, V, (7, 9), generator=generator)
    return Batch(tokens, torch.cat([prompt, mask], 1), torch.cat([prompt, torch.zeros_like(mask)], 1))


def denoiser(frozen: bool = True) -> TransformerDenoiser:
    """A frozen one is the same whatever was seeded, as if it came from a file: checkpoints do not hold it."""
    with torch.random.fork_rng(enabled=frozen):
        if frozen:
            torch.manual_seed(3)
        return TransformerDenoiser(V + 1, V, width=8, layers=1, heads=2)


OPTIONS: dict[str, Any] = {
    "updates": UPDATES,
    "batch_size": 3,
    "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "grad_clip": 1.0,
    "log_every": 2,
    "progress": False,
}


def learn(model: nn.Module, guide: nn.Module, out: Path | None, particles: int = 2, **changes: Any) -> FitResult:
    chosen: dict[str, Any] = OPTIONS | {"objective": RevealTraceGraph_ELBO(num_particles=particles)} | changes
    return fit(model, guide, ragged(0), out=out, **chosen)


def scores(out: int = 1) -> SequenceEncoder:
    return SequenceEncoder(V + 1, out, width=8, layers=1, heads=2)


def learned() -> LearnedPolicy:
    return LearnedPolicy(PolicyNetwork(V + 1, width=8, layers=1, heads=2))


def mean_field(out: Path | None, **changes: Any) -> tuple[nn.Module, FitResult]:
    """A trainable denoiser; sorted batches; a moving average; validations; two steps of three are scored."""
    model = UnmaskingModel(denoiser(frozen=False), RandomSteps(), T)
    guide = MeanFieldGuide(scores(T), T)
    options = {"validation": ragged(5), "validate_every": 2, "ema_decay": 0.8, "group": 2, "train_denoiser": True}
    options |= {"objective": RevealTraceGraph_ELBO(2, scored_steps=2)}
    return nn.ModuleList([model, guide]), learn(model, guide, out, **(options | changes))


def policy(out: Path | None, **changes: Any) -> tuple[nn.Module, FitResult]:
    """A policy that guides itself, on a frozen denoiser."""
    model = UnmaskingModel(denoiser(), learned(), T)
    return model, learn(model, PolicyGuide(model.policy, model.denoiser, T), out, particles=3, **changes)


def posterior(out: Path | None, **changes: Any) -> tuple[nn.Module, FitResult]:
    """A posterior beside a learned policy, with learning rates of their own."""
    model = UnmaskingModel(denoiser(), learned(), T)
    guide = RenormalisedScoreGuide(scores(), T, temperature=0.7)
    options = {"lr": {"guide": 0.1, "policy": 0.02}} | changes
    return nn.ModuleList([model, guide]), learn(model, guide, out, **options)


def heuristic(out: Path | None, **changes: Any) -> tuple[nn.Module, FitResult]:
    """A decoding policy with noise of its own as the guide."""
    model = UnmaskingModel(denoiser(frozen=False), RandomSteps(), T)
    guide = PolicyGuide(Smoothed(Ranked("random"), 0.1), model.denoiser, T)
    return model, learn(model, guide, out, train_denoiser=True, **changes)


def masked_diffusion(out: Path | None, **changes: Any) -> tuple[nn.Module, FitResult]:
    """The loss of a denoiser, with maskings spread over the whole batch."""
    module = denoiser(frozen=False)
    options: dict[str, Any] = {name: OPTIONS[name] for name in ("updates", "batch_size", "log_every", "progress")}
    options |= {"lr": 0.01, "warmup": 2, "drop_last": False, "out": out} | changes
    return module, train_denoiser(module, ragged(0), validation=ragged(5), **options)


class Lazy(nn.Module):
    """Shapes known from the first batch, a parameter that no batch reaches, and a loss that fails when told to."""

    def __init__(self, fails: Literal["", "nan", "stop"] = "") -> None:
        super().__init__()
        self.net, self.unused, self.fails, self.calls = nn.LazyLinear(1), nn.Parameter(torch.ones(3)), fails, 0

    def forward(self, batch: Batch) -> Tensor:
        self.calls += 1
        size = torch.stack([batch.latent.sum(-1), (batch.tokens * batch.latent).sum(-1)], -1)
        loss = self.net(size.to(torch.float64)).square().mean()
        if self.calls == 4 and os.environ.get("RANK", "1") == "1":
            if self.fails == "stop":
                signal.raise_signal(signal.SIGTERM)
            loss = loss * torch.nan if self.fails == "nan" else loss
        return loss

    def explain(self, batch: Batch) -> str | None:
        return "says one" if os.environ.get("RANK", "1") == "1" else None


def lazy(out: Path | None, **changes: Any) -> tuple[nn.Module, FitResult]:
    """Unknown shapes, unused parameters."""
    module = Lazy()
    return module, train(module, ragged(0), TrainSettings(**(OPTIONS | changes)), out=out)


CASES: dict[str, Callable[..., tuple[nn.Module, FitResult]]] = {
    case.__name__: case for case in (mean_field, policy, posterior, heuristic, masked_diffusion, lazy)
}
RESUMED = ("policy", "posterior")
IN_PIECES = ("mean_field", "masked_diffusion")


def record(case: str, out: Path, rank: int, name: str = "", **changes: Any) -> None:
    """Run a case and keep its parameters and trace."""
    pyro.set_rng_seed(10)
    if rank:  # the first process's networks and draws count
        pyro.set_rng_seed(11)
    module, result = CASES[case](out / (case + name), **changes)
    save_weights(module, out / f"{case}{name}_{rank}.safetensors")
    trace = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.trace]
    numbers = {"trace": trace, "validations": result.validations, "updates": result.updates}
    numbers |= {"next_draw": float(torch.rand(()))}
    (out / f"{case}{name}_{rank}.result").write_text(json.dumps(numbers))


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "none"


def worker(out: Path) -> None:
    """What each process of the launch does."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rank = int(os.environ["RANK"])
    for case in CASES:
        record(case, out, rank)
    for case in RESUMED:
        record(case, out, rank, "_half", updates=UPDATES // 2)
    for case in IN_PIECES:
        record(case, out, rank, "_pieces", accumulate=2)
    settings = TrainSettings(**(OPTIONS | {"log_every": 1}))
    refusals = {
        "nan": refusal(lambda: train(Lazy("nan"), ragged(0), settings)),
        "data": refusal(lambda: train(Lazy(), ragged(rank), settings)),
        "folder": refusal(lambda: policy(out / "policy")),
        "validation": refusal(lambda: train(Lazy(), ragged(0), settings, validate=complain)),
    }
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))  # as if the process went on
    stopped = train(Lazy("stop"), ragged(0), TrainSettings(**OPTIONS), out=out / "stopped")
    (out / f"said_{rank}.json").write_text(json.dumps(refusals | {"stopped": [stopped.updates, caught]}))


def complain() -> dict[str, float]:
    raise UserError("validation", "is nothing", "give some")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a launch on two processes."""
    out = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(out / "said.txt", "wb") as said:
        process = subprocess.Popen(
            [*launcher, __file__, str(out)], env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, (out / "said.txt").read_text()[-4000:]
    return out


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(one: object, other: object) -> None:
    """Equal up to rounding, through lists and dictionaries."""
    if isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, list):
        assert isinstance(other, list) and len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            close(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-11)  # mean steps are float32
    else:
        assert one == other


def parameters(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("case", list(CASES))
def test_processes_agree_with_each_other_and_with_one(case: str, two: Path, tmp_path: Path, double: None) -> None:
    first, second = (parameters(two / f"{case}_{rank}") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    record(case, tmp_path, 0)
    alone = parameters(tmp_path / f"{case}_0")
    moved = 0.0
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-11)
        moved = max(moved, float(tensor.abs().max()))
    assert moved > 0
    mine = json.loads((tmp_path / f"{case}_0.result").read_text())
    for rank in (0, 1):
        close(json.loads((two / f"{case}_{rank}.result").read_text()), mine)
    # written once, by the first process
    log = [json.loads(line) for line in (two / case / "log.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in log if "validation" not in entry] == list(range(1, mine["updates"] + 1))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("accumulate", [2, 5])
def test_a_batch_in_pieces_gives_the_update_of_the_whole(
    case: str, accumulate: int, tmp_path: Path, double: None
) -> None:
    record(case, tmp_path, 0)
    record(case, tmp_path, 0, "_pieces", accumulate=accumulate)
    whole, pieces = (parameters(tmp_path / f"{case}{name}_0") for name in ("", "_pieces"))
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-9, atol=1e-11)
    close(*(json.loads((tmp_path / f"{case}{name}_0.result").read_text()) for name in ("", "_pieces")))


@pytest.mark.parametrize("case", IN_PIECES)
def test_pieces_on_two_processes(case: str, two: Path) -> None:
    """Batches of three rows on two processes in two pieces: one of the four pieces has no row."""
    whole, first, second = (parameters(two / f"{case}{name}") for name in ("_0", "_pieces_0", "_pieces_1"))
    for name, tensor in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", RESUMED)
def test_one_process_goes_on_from_the_checkpoint_of_two(case: str, two: Path, tmp_path: Path, double: None) -> None:
    pyro.set_rng_seed(99)
    module, result = CASES[case](two / f"{case}_half", resume=True)
    whole, expected = CASES[case](tmp_path)[0], json.loads((two / f"{case}_0.result").read_text())
    load_weights(whole, two / f"{case}_0.safetensors")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
    close([entry["loss"] for entry in result.trace], [entry["loss"] for entry in expected["trace"]])


def test_an_error_stops_all_processes_with_the_same_words(two: Path) -> None:
    one, other = (json.loads((two / f"said_{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert "the loss is nan at update 3: row " in one["nan"] and "says one" in one["nan"]
    assert one["data"].startswith("data: differs between the processes")
    assert "already holds a run" in one["folder"]
    assert one["validation"] == "validation: is nothing; give some"


def test_a_signal_to_one_process_stops_all_at_the_next_log_point(two: Path, double: None) -> None:
    for rank in (0, 1):
        updates, caught = json.loads((two / f"said_{rank}.json").read_text())["stopped"]
        assert (updates, caught) == (4, [signal.SIGTERM])
    assert [path.name for path in (two / "stopped" / "checkpoints").iterdir()] == ["update_00000004.pt"]
    assert f"interrupted: update 4 is saved in {two / 'stopped'}" in (two / "said.txt").read_text()
    assert train(Lazy(), ragged(0), TrainSettings(**OPTIONS), out=two / "stopped", resume=True).updates == UPDATES


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
