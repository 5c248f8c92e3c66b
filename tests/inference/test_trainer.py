"""The training loop on losses of its own: bit-equal resumes, the log, averages, interrupts, refusals."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.inference.annealing import Anneal, set_number
from orderppl.inference.trainer import FitResult, TrainSettings, train
from orderppl.unmasking import Batch


class Regression(nn.Module):
    """Noisy least squares: its loss draws random numbers, as a stochastic bound does."""

    def __init__(self, poison_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.noise = 0.1
        self.metrics: dict[str, Tensor] = {}
        self.calls, self.poison_at = 0, poison_at

    def forward(self, batch: Batch) -> Tensor:
        self.calls += 1
        x = batch.tokens / 10 - 1.0
        error = self.net(x + self.noise * torch.randn_like(x))[:, 0] - x[:, 0].sin()
        loss = error.pow(2).mean()
        self.metrics = {"elbo": -loss.detach(), "steps": error.detach().abs().max()}
        if self.calls == self.poison_at:
            loss = loss * math.nan
        return loss


def data() -> Batch:
    return Batch(torch.randint(0, 20, (50, 4), generator=torch.Generator().manual_seed(0)))


def run(
    loss: nn.Module, *, out: Path | None = None, resume: bool = False, rows: Any = None, **changes: Any
) -> FitResult:
    """Thirty updates, or what the changes say."""
    others = {name: changes.pop(name) for name in ("validate", "anneal") if name in changes}
    chosen: dict[str, Any] = {
        "updates": 30,
        "batch_size": 8,
        "optimizer": partial(torch.optim.AdamW, lr=0.02),
        "schedule": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30),
        "grad_clip": 1.0,
        "log_every": 4,
        "progress": False,
    }
    settings = TrainSettings(**(chosen | changes))
    return train(loss, data() if rows is None else rows, settings, out=out, resume=resume, **others)


class StopError(Exception):
    """Stands for a kill signal."""


def at_call(loss: Regression, calls: int, act: Any) -> None:
    """Do something when the loss is called for the so many-th time."""
    inner = loss.forward

    def forward(batch: Batch) -> Tensor:
        if loss.calls == calls:
            act()
        return inner(batch)

    loss.forward = forward  # type: ignore[method-assign]


def stop() -> None:
    raise StopError


def weights(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def without_time(path: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record.pop("seconds", None)
    return records


def saved(out: Path, update: int) -> dict[str, Any]:
    """What a checkpoint holds, but for its wall-clock time."""
    state: dict[str, Any] = torch.load(out / "checkpoints" / f"update_{update:08d}.pt", weights_only=True)
    return {key: value for key, value in state.items() if key != "seconds"}


def same(one: Any, other: Any) -> bool:
    """Bit-equal, through containers."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_reduces_the_loss_and_logs_every_update(tmp_path: Path) -> None:
    loss = Regression()
    frozen = loss.frozen.weight.clone()
    result = run(loss, updates=150, out=tmp_path, schedule="constant")
    assert sum(result.losses[-20:]) < 0.5 * sum(result.losses[:20])
    records = without_time(tmp_path / "log.jsonl")
    assert [record["update"] for record in records] == list(range(1, 151))
    assert [record["loss"] for record in records] == result.losses
    assert set(records[0]) == {"update", "loss", "elbo", "steps", "grad_norm", "lr"}
    assert set(records[3]) == {*records[0], "grad_mean_norm"}  # of Adam, at log points
    # each update keeps its own metrics, not those of the log point
    assert all(r["elbo"] == -r["loss"] for r in records)
    assert len({r["steps"] for r in records}) > 100
    assert torch.equal(loss.frozen.weight, frozen)
    assert result.updates == 150
    assert result.seconds > 0
    assert repr(result) == (
        f"FitResult(updates=150, loss={result.losses[-1]:.4g}, elbo={-result.losses[-1]:.4g}, "
        f"steps={records[-1]['steps']:.4g}, seconds={result.seconds:.3g}, out={str(tmp_path)!r})"
    )


@pytest.mark.parametrize("killed_at", [3, 10, 17, 29])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_resume_is_bit_equal(tmp_path: Path, killed_at: int, ema_decay: float | None) -> None:
    def fit(loss: Regression, out: Path, **changes: Any) -> FitResult:
        noise = Anneal(0.3, 0.05, 20)

        def anneal(update: int) -> dict[str, float]:
            set_number({"loss": loss}, "loss.noise", noise(update))
            return {"loss.noise": loss.noise}

        torch.manual_seed(7)
        return run(
            loss,
            out=out,
            checkpoint_every=5,
            ema_decay=ema_decay,
            anneal=anneal,
            validate=lambda: {"loss": float(loss(data().rows(slice(8))))},
            validate_every=7,
            **changes,
        )

    whole = Regression()
    expected = fit(whole, tmp_path / "whole")
    killed = Regression()
    at_call(killed, killed_at, stop)
    with pytest.raises(StopError):
        fit(killed, tmp_path / "parts")
    torch.manual_seed(12345)  # the resumed process starts elsewhere
    resumed = Regression()
    result = fit(resumed, tmp_path / "parts", resume=True)
    assert result.losses == expected.losses
    assert result.validations == expected.validations
    assert len(result.validations) == 5
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    assert without_time(tmp_path / "parts" / "log.jsonl") == without_time(tmp_path / "whole" / "log.jsonl")
    assert same(saved(tmp_path / "parts", 30), saved(tmp_path / "whole", 30))


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    torch.manual_seed(7)
    whole = Regression()
    expected = run(whole, schedule="constant")
    torch.manual_seed(7)
    first = run(Regression(), updates=12, schedule="constant", out=tmp_path)
    second = Regression()
    result = run(second, schedule="constant", out=tmp_path, resume=True)
    assert first.losses == expected.losses[:12]
    assert result.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(whole), strict=True))


def test_a_seed_makes_batches_and_a_fit_the_same_whenever_it_runs() -> None:
    class Rows(Regression):
        def forward(self, batch: Batch) -> Tensor:
            seen.append(batch.tokens.tolist())
            return super().forward(batch)

    orders = []
    for seed, state in ((5, 0), (5, 1), (6, 0)):
        seen: list[Any] = []
        torch.manual_seed(state)
        run(Rows(), updates=8, seed=seed)
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_checkpoint_and_says_so(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(7)
    expected = run(Regression())
    caught = []
    before = signal.signal(number, lambda *_: caught.append(number))  # as if the process went on
    try:
        torch.manual_seed(7)
        loss = Regression()
        at_call(loss, 13, partial(signal.raise_signal, number))
        run(loss, out=tmp_path)
    finally:
        signal.signal(number, before)
    assert caught == [number]
    assert f"interrupted: update 14 is saved in {tmp_path}" in capsys.readouterr().err
    assert len(without_time(tmp_path / "log.jsonl")) == 14
    resumed = Regression()
    assert run(resumed, out=tmp_path, resume=True).losses == expected.losses


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    loss = Regression()
    at_call(loss, 5, twice)
    with pytest.raises(KeyboardInterrupt):
        run(loss, out=tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_fit_without_a_folder_is_interrupted_as_any_program() -> None:
    loss = Regression()
    at_call(loss, 5, partial(signal.raise_signal, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(loss)
    assert loss.calls == 5


def test_a_second_process_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from orderppl.files import locked
        with locked(Path(sys.argv[1])):
            print("locked", flush=True)
            sys.stdin.readline()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="out: another process writes into"):
        run(Regression(), updates=2, out=tmp_path)
    process.communicate("\n")
    assert run(Regression(), updates=2, out=tmp_path).updates == 2


def test_resume_cuts_records_past_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    run(Regression(), updates=10, out=tmp_path, schedule="constant")
    log = tmp_path / "log.jsonl"
    good = log.read_text()
    log.write_text(good + '{"update": 11, "loss": 1.0}\n{"update": 12, "lo')
    result = run(Regression(), updates=10, out=tmp_path, schedule="constant", resume=True)
    assert log.read_text() == good
    assert len(result.losses) == 10


def test_resume_without_a_checkpoint_starts_from_the_start_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text('{"update": 1, "loss": 5.0}\n')
    result = run(Regression(), updates=3, out=tmp_path, resume=True)
    assert len(result.losses) == 3
    assert result.losses[0] != 5.0
    assert f"no checkpoint in {tmp_path}: starting at the first update" in capsys.readouterr().err


@pytest.mark.parametrize("poison_at", [1, 13])
def test_refuses_nan_and_keeps_the_last_good_checkpoint(tmp_path: Path, poison_at: int) -> None:
    loss = Regression(poison_at=poison_at)
    with pytest.raises(UserError, match=f"the loss is nan at update {poison_at}; lower the learning rate") as caught:
        run(loss, out=tmp_path, checkpoint_every=6, log_every=5)
    assert "\n" not in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in weights(loss))  # on the CPU, found before the update
    found = sorted(path.name for path in (tmp_path / "checkpoints").glob("*"))
    assert found == ([] if poison_at == 1 else ["update_00000006.pt", "update_00000012.pt"])
    assert ("last good checkpoint" in str(caught.value)) == (poison_at == 13)
    log = tmp_path / "log.jsonl"
    assert all(math.isfinite(record["loss"]) for record in without_time(log))
    if poison_at == 13:
        healthy = run(Regression(), out=tmp_path, resume=True)
        assert all(math.isfinite(value) for value in healthy.losses)


def test_the_first_row_that_a_loss_cannot_take_is_named() -> None:
    class Picky(Regression):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) / (batch.tokens != 99).all()

        def explain(self, batch: Batch) -> str | None:
            assert len(batch) == 1 and not torch.is_grad_enabled()
            return "token 99" if (batch.tokens == 99).any() else None

    rows = data()
    rows.tokens[37, 2] = 99
    with pytest.raises(UserError, match="the loss is inf at update [1-7]: row 37 of the data: token 99; see to that"):
        run(Picky(), rows=rows, accumulate=3)


def test_refuses_an_infinite_gradient() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, batch: Batch) -> Tensor:
            return self.weight.sqrt()

    with pytest.raises(UserError, match="the gradient is inf at update 1"):
        run(Root(), grad_clip=None, log_every=1)


def test_validation_does_not_disturb_training() -> None:
    torch.manual_seed(0)
    plain = run(Regression())
    torch.manual_seed(0)
    draws: list[float] = []
    loss = Regression()

    def validate() -> dict[str, float]:
        assert not torch.is_grad_enabled() and not loss.training and not loss.net.training
        draws.append(float(torch.randn(())))
        return {"loss": 0.0}

    checked = run(loss, validate=validate, validate_every=3)
    assert plain.losses == checked.losses
    assert loss.training and loss.net.training
    assert [p.requires_grad for p in loss.frozen.parameters()] == [False, False]
    assert len(draws) == 10
    assert len(set(draws)) == 1  # common random numbers


@pytest.mark.parametrize("validate_every", [None, 4])
def test_the_module_is_validated_and_ends_as_the_average_of_its_parameters(validate_every: int | None) -> None:
    loss = Regression()
    start = [p.detach().clone() for p in loss.net.parameters()]
    history: list[list[Tensor]] = []
    seen: list[list[Tensor]] = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            value = super().step(closure)
            history.append([p.detach().clone() for p in loss.net.parameters()])
            return value

    def validate() -> dict[str, float]:
        seen.append([p.detach().clone() for p in loss.net.parameters()])
        return {"loss": 0.0}

    run(
        loss,
        optimizer=partial(Spy, lr=0.1),
        schedule="constant",
        ema_decay=0.8,
        validate=validate,
        validate_every=validate_every,
    )
    expected, averages = [], start
    for update, values in enumerate(history):
        decay = min(0.8, (1 + update) / (10 + update))
        averages = [decay * a + (1 - decay) * v for a, v in zip(averages, values, strict=True)]
        if update + 1 == 30 or (validate_every and (update + 1) % validate_every == 0):
            expected.append(averages)
    for found, wanted in zip([*seen, list(loss.net.parameters())], [*expected, averages], strict=True):
        for parameter, average in zip(found, wanted, strict=True):
            torch.testing.assert_close(parameter.detach(), average)


@torch.no_grad()
def test_trains_where_gradients_are_switched_off() -> None:
    result = run(Regression(), updates=60)
    assert sum(result.losses[-10:]) < sum(result.losses[:10])
    assert not torch.is_grad_enabled()


def test_autocast_runs_the_loss_and_the_validation_in_bfloat16() -> None:
    seen: list[torch.dtype] = []

    class Spy(Regression):
        def forward(self, batch: Batch) -> Tensor:
            seen.append(self.net(batch.tokens.float()).dtype)
            return super().forward(batch)

    loss = Spy()
    run(loss, updates=2, bfloat16=True, validate=lambda: {"loss": float(loss(data()))})
    assert seen == [torch.bfloat16] * 3


def test_says_once_what_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    run(Regression(), updates=3, progress=True)
    assert capsys.readouterr().err.count("fit: training net (49); frozen: frozen (20)") == 1
    run(Regression(), updates=3)
    assert capsys.readouterr().err == ""


class Parts(Regression):
    """A gradient of one for every parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.guide, self.rest = nn.Linear(4, 4), nn.Parameter(torch.zeros(3))

    def forward(self, batch: Batch) -> Tensor:
        return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()


def moved(loss: Parts, before: list[Tensor]) -> dict[str, float]:
    """By how much one update has changed every parameter."""
    pairs = zip(before, loss.named_parameters(), strict=True)
    return {name: float((old - new.detach()).flatten()[0]) for old, (name, new) in pairs}


def test_parts_have_learning_rates_of_their_own() -> None:
    loss = Parts()
    before = [p.detach().clone() for p in loss.parameters()]
    options = {"optimizer": partial(torch.optim.SGD, lr=0.5), "schedule": "constant", "grad_clip": None, "updates": 1}
    result = run(loss, lr={"guide": 0.25, "guide.bias": 0.125, "net.2": 0.0625}, **options)
    changes = moved(loss, before)
    wanted = {"guide.weight": 0.25, "guide.bias": 0.125, "net.0.weight": 0.5, "net.2.bias": 0.0625, "rest": 0.5}
    assert {name: changes[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    rates = {key: value for key, value in result.trace[0].items() if key.startswith("lr.")}
    assert rates == {"lr.guide": 0.25, "lr.guide.bias": 0.125, "lr.net.2": 0.0625, "lr.rest": 0.5}
    with pytest.raises(UserError, match=r"lr.policy: names no part that is trained"):
        run(Parts(), lr={"policy": 0.1}, **options)
    loss = Parts()
    before = [p.detach().clone() for p in loss.parameters()]
    run(loss, lr=0.25, **options)
    assert moved(loss, before)["rest"] == pytest.approx(0.25)


def test_takes_optimisers_that_are_made_already_and_those_of_pyro() -> None:
    loss = Parts()
    before = [p.detach().clone() for p in loss.parameters()]
    options = {"schedule": "constant", "grad_clip": None, "updates": 1}
    run(loss, optimizer=torch.optim.SGD(loss.guide.parameters(), lr=0.5), **options)
    changes = moved(loss, before)
    assert changes["guide.weight"] == pytest.approx(0.5)
    assert changes["net.0.weight"] == changes["rest"] == 0.0
    run(loss, optimizer=pyro.optim.SGD({"lr": 0.25}), **options)
    assert moved(loss, before)["rest"] == pytest.approx(0.25)
    with pytest.raises(UserError, match="holds none of what is trained"):
        run(loss, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5), **options)
    with pytest.raises(UserError, match="has been made already"):
        run(loss, optimizer=torch.optim.SGD(loss.parameters(), lr=0.5), lr=0.1, **options)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [r["lr"] for r in run(Regression(), lr=0.2, warmup=5, schedule="cosine").trace]
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert rates[5:] == pytest.approx([0.1 * (1 + math.cos(math.pi * i / 25)) for i in range(25)])
    flat = [r["lr"] for r in run(Regression(), lr=0.2, warmup=5, schedule="constant").trace]
    assert flat[4:] == [0.2] * 26


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"updates": 0}, "updates"),
        ({"batch_size": 0}, "batch_size"),
        ({"log_every": 0}, "log_every"),
        ({"accumulate": 0}, "accumulate"),
        ({"grad_clip": -1.0}, "grad_clip"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"schedule": "steps"}, "schedule"),
        ({"seed": -1}, "seed"),
        ({"resume": True}, "resume"),
        ({"rows": {"tokens": torch.zeros(0, 3, dtype=torch.long)}}, "data"),
    ],
)
def test_refuses_bad_options(changes: dict[str, object], field: str) -> None:
    with pytest.raises(UserError) as caught:
        run(Regression(), **changes)
    assert caught.value.field == field


def test_refuses_a_folder_that_holds_a_run_and_a_module_without_parameters(tmp_path: Path) -> None:
    run(Regression(), updates=2, out=tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        run(Regression(), updates=2, out=tmp_path)
    with pytest.raises(UserError, match="no parameter that requires a gradient"):
        run(Regression().requires_grad_(False))


def test_refuses_a_checkpoint_of_another_architecture_average_or_data(tmp_path: Path) -> None:
    run(Regression(), updates=2, out=tmp_path)
    other = Regression()
    other.net[0] = nn.Linear(4, 9)
    with pytest.raises(UserError, match=r"'net.0.weight' has shape \[8, 4\]"):
        run(other, updates=2, out=tmp_path, resume=True)
    with pytest.raises(UserError, match="average: the checkpoint has none, this run has one; resume"):
        run(Regression(), updates=2, out=tmp_path, resume=True, ema_decay=0.9)
    rows = data()
    rows.tokens[0, 0] += 1
    with pytest.raises(UserError, match="data: the checkpoint was written with"):
        run(Regression(), updates=2, out=tmp_path, resume=True, rows=rows)
    with pytest.raises(UserError, match="batch_size: the checkpoint was written with 8, this run has 5"):
        run(Regression(), updates=2, out=tmp_path, resume=True, batch_size=5)


SCRIPT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    import torch
    from test_trainer import Regression, run
    torch.manual_seed(3)
    class Slow(Regression):
        def forward(self, batch):
            time.sleep(0.01)
            return super().forward(batch)
    run(Slow(), updates=60, log_every=1, out=Path(sys.argv[1]), checkpoint_every=7)
    """
)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_process_that_is_stopped_anyhow_resumes_to_the_same_trace(number: int, tmp_path: Path) -> None:
    whole = run(Regression(), updates=60, log_every=1, out=tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "parts")],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "parts" / "log.jsonl"
    for _ in range(3000):
        if log.exists() and log.read_text().count("\n") > 20:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == -number or (number == signal.SIGINT and "KeyboardInterrupt" in said), said
    done = log.read_text().count("\n")
    assert 20 < done < 60
    if number != signal.SIGKILL:
        assert f"interrupted: update {done} is saved" in said
    torch.manual_seed(5)
    parts = run(Regression(), updates=60, log_every=1, out=tmp_path / "parts", resume=True)
    assert parts.losses == whole.losses
    assert same(saved(tmp_path / "parts", 60), saved(tmp_path / "whole", 60))
