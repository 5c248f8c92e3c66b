"""Two processes against one: the same parameters and losses, whatever program, batch or interruption.

Run by a launcher, this file is what each process does: all cases, one after another.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from orderppl.decoding import Random
from orderppl.errors import UserError
from orderppl.experiments import cli
from orderppl.guides import HeuristicGuide, MeanFieldGuide, PolicyGuide, RenormalisedScoreGuide
from orderppl.inference import BatchStream, FitResult, OrderLoss, RevealTraceGraph_ELBO, fit, optimise
from orderppl.inference.checkpoints import load_weights, save_weights
from orderppl.models import LearnedPolicy, UniformSteps, UnmaskingModel
from orderppl.models.denoisers import TransformerDenoiser, train_denoiser
from orderppl.models.networks import PolicyNetwork, SequenceEncoder

T, V = 3, 4
UPDATES = 6  # two epochs


def ragged(seed: int) -> dict[str, Tensor]:
    """Seven rows of 2 to 6 tokens after prompts of 1 to 3: batches of 3, 3 and 1."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.randint(2, 7, (7, 1), generator=generator)
    context_mask = torch.arange(3) < torch.randint(1, 4, (7, 1), generator=generator)
    tokens = torch.randint(0, V, (7, 6), generator=generator)
    context = torch.randint(0, V, (7, 3), generator=generator)
    return {"tokens": tokens, "attention_mask": mask, "context": context, "context_mask": context_mask}


def stream(**options: Any) -> BatchStream:
    return BatchStream(ragged(0), 3, seed=1, **options)


def denoiser(frozen: bool) -> TransformerDenoiser:
    """A frozen one is the same whatever was seeded, as if it came from a file: checkpoints do not hold it."""
    with torch.random.fork_rng(enabled=frozen):
        if frozen:
            torch.manual_seed(3)
        return TransformerDenoiser(V + 1, V, width=8, layers=1, heads=2).requires_grad_(not frozen)


OPTIONS: dict[str, Any] = {
    "updates": UPDATES,
    "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "grad_clip": 1.0,
    "log_every": 2,
    "progress": False,
}


def mean_field(out: Path, **changes: Any) -> tuple[nn.Module, FitResult]:
    """A trainable denoiser; sorted batches; a moving average; patience that runs out."""
    model = UnmaskingModel(denoiser(frozen=False), UniformSteps(), T)
    guide = MeanFieldGuide(SequenceEncoder(V + 1, T, width=8, layers=1, heads=2), T)
    elbo = RevealTraceGraph_ELBO(num_particles=2)
    held_out = BatchStream(ragged(5), 4)

    def validate() -> dict[str, float]:
        loss = OrderLoss(model, guide, elbo)
        return {"loss": -sum(float(loss(**batch)) for batch in held_out.once())}  # the wrong sign: never better

    options = OPTIONS | {"validate": validate, "validate_every": 2, "patience": 2, "ema_decay": 0.8, "out": out}
    return nn.ModuleList([model, guide]), fit(model, guide, stream(group=2), elbo=elbo, **(options | changes))


def policy(out: Path, **changes: Any) -> tuple[nn.Module, FitResult]:
    """A policy that guides itself, on a frozen denoiser."""
    model = UnmaskingModel(denoiser(frozen=True), LearnedPolicy(PolicyNetwork(V + 1, width=8, layers=1, heads=2)), T)
    guide = PolicyGuide(model.prior, model.denoiser, T)
    options = OPTIONS | {"out": out} | changes
    return model, fit(model, guide, stream(), elbo=RevealTraceGraph_ELBO(num_particles=3), **options)


def one_step(out: Path, **changes: Any) -> tuple[nn.Module, FitResult]:
    """One step per sequence, in the stored order of the rows."""
    prior = LearnedPolicy(PolicyNetwork(V + 1, width=8, layers=1, heads=2))
    model = UnmaskingModel(denoiser(frozen=True), prior, T, one_step=True)
    guide = RenormalisedScoreGuide(SequenceEncoder(V + 1, 1, width=8, layers=1, heads=2), T, temperature=0.7)
    options = OPTIONS | {"out": out} | changes
    result = fit(model, guide, stream(shuffle=False), elbo=RevealTraceGraph_ELBO(num_particles=2), **options)
    return nn.ModuleList([model, guide]), result


def heuristic(out: Path, **changes: Any) -> tuple[nn.Module, FitResult]:
    """A decoding policy with noise of its own as the guide."""
    model = UnmaskingModel(denoiser(frozen=False), UniformSteps(), T)
    guide = HeuristicGuide(Random(), model.denoiser, T, smoothing=0.1)
    options = OPTIONS | {"out": out} | changes
    return model, fit(model, guide, stream(), elbo=RevealTraceGraph_ELBO(num_particles=2), **options)


def masked_diffusion(out: Path, **changes: Any) -> tuple[nn.Module, FitResult]:
    """A loss that is a mean over tokens, so that shares of a batch weigh by theirs."""
    module = denoiser(frozen=False)
    options = {"updates": UPDATES, "lr": 0.01, "warmup": 2, "log_every": 2, "progress": False, "out": out} | changes
    return module, train_denoiser(module, stream(), validation=BatchStream(ragged(5), 4), **options)


class Lazy(nn.Module):
    """Shapes known from the first batch, a parameter that no batch reaches, and a loss that fails when told to."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.net, self.unused, self.fails, self.calls = nn.LazyLinear(1), nn.Parameter(torch.ones(3)), fails, 0

    def forward(self, tokens: Tensor, **others: Tensor) -> Tensor:
        self.calls += 1
        loss = self.net(tokens.to(torch.float64)).square().mean()
        if self.calls == 4 and self.fails == "nan" and os.environ.get("RANK", "1") == "1":
            loss = loss * torch.nan
        return loss


def lazy(out: Path, **changes: Any) -> tuple[nn.Module, FitResult]:
    """Unknown shapes, unused parameters."""
    module = Lazy()
    return module, optimise(module, stream(trim=False), **(OPTIONS | {"out": out} | changes))


CASES: dict[str, Callable[..., tuple[nn.Module, FitResult]]] = {
    case.__name__: case for case in (mean_field, policy, one_step, heuristic, masked_diffusion, lazy)
}
RESUMED = ("policy", "one_step")
IN_PIECES = ("mean_field", "masked_diffusion")

COMMAND = ["fit-order", "--config", "chain"]
for setting in (
    "task.length=6",
    "task.train=20",
    "task.validation=5",
    "task.test=10",
    "num_steps=2",
    "elbo.num_particles=2",
    "fit.updates=3",
    "fit.batch_size=7",
    "fit.log_every=1",
    "dtype=float64",
):
    COMMAND += ["--set", setting]


def record(case: str, out: Path, rank: int, name: str = "", **changes: Any) -> None:
    """Run a case and keep its parameters and trace."""
    pyro.set_rng_seed(10)
    if rank:  # the first process's networks and draws count
        pyro.set_rng_seed(11)
    module, result = CASES[case](out / (case + name), **changes)
    save_weights(module, out / f"{case}{name}_{rank}")
    trace = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.trace]
    numbers = {"trace": trace, "validations": result.validations, "stopped": result.stopped_early}
    numbers |= {"updates": result.updates, "next_draw": float(torch.rand(()))}
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
    refusals = {
        "nan": refusal(lambda: optimise(Lazy("nan"), stream(trim=False), **(OPTIONS | {"log_every": 1}))),
        "data": refusal(lambda: optimise(Lazy(), BatchStream(ragged(rank), 3), **OPTIONS)),
        "folder": refusal(lambda: policy(out / "policy")),
        "monitor": refusal(lambda: masked_diffusion(out / "monitor", monitor="accuracy")),
    }
    said = {}
    for name, more in {"good": [], "bad": ["--set", "optimizer.lr=1e308"], "single": []}.items():
        command = ["chain", "--out", str(out / "x")] if name == "single" else [*COMMAND, "--out", str(out / name)]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main([*command, *more])
            except SystemExit as end:
                said[name] = [end.code, errors.getvalue()]
    (out / f"said_{rank}.json").write_text(json.dumps({"refusals": refusals, "said": said}))


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
    assert mine["stopped"] == (case == "mean_field")
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
    load_weights(whole, two / f"{case}_0")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
    close([entry["loss"] for entry in result.trace], [entry["loss"] for entry in expected["trace"]])


def test_an_error_stops_all_processes_and_is_told_once(two: Path) -> None:
    one, other = (json.loads((two / f"said_{rank}.json").read_text()) for rank in (0, 1))
    assert one["refusals"] == other["refusals"]
    assert "the loss is nan at update 3" in one["refusals"]["nan"]
    assert one["refusals"]["data"].startswith("stream: differs between the processes")
    assert "already holds a run" in one["refusals"]["folder"]
    assert one["refusals"]["monitor"].startswith("monitor: validation gives")
    for name, words in {"bad": "update", "single": "runs in one process, not in 2"}.items():
        code, said = one["said"][name]
        assert code == 2 and said.count("error") == 1
        assert said.splitlines()[-1].startswith("error: ") and words in said  # after the progress bar
        assert other["said"][name] == [2, ""]


def test_the_command_gives_the_results_of_one_process(two: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*COMMAND, "--out", str(tmp_path / "good")])
    assert end.value.code == 0
    together, alone = (json.loads((folder / "good" / "results.json").read_text()) for folder in (two, tmp_path))
    close(together["records"], alone["records"])


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
