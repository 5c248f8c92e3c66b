import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from orderppl.errors import UserError
from orderppl.inference.annealing import Anneal
from orderppl.inference.batches import BatchStream
from orderppl.inference.optimise import optimise


class Regression(nn.Module):
    """Noisy least squares: its loss draws random numbers, as a stochastic bound does."""

    def __init__(self, poison_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.noise = 0.1
        self.metrics: dict[str, torch.Tensor] = {}
        self.calls, self.poison_at = 0, poison_at

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        error = self.net(x + self.noise * torch.randn_like(x))[:, 0] - y
        loss = error.pow(2).mean()
        self.metrics = {"elbo": -loss.detach(), "steps": error.detach().abs().max()}
        if self.calls == self.poison_at:
            loss = loss * math.nan
        return loss


def stream() -> BatchStream:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator)
    return BatchStream({"x": x, "y": x[:, 0].sin()}, 8, seed=1)


def options(**changes):
    return {
        "updates": 30,
        "optimizer": partial(torch.optim.AdamW, lr=0.02),
        "scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30),
        "grad_clip": 1.0,
        "log_every": 4,
        "progress": False,
        **changes,
    }


class StopError(Exception):
    """Stands for a kill signal."""


def kill_after(loss: Regression, calls: int) -> None:
    inner = loss.forward

    def forward(**batch: torch.Tensor) -> torch.Tensor:
        if loss.calls == calls:
            raise StopError
        return inner(**batch)

    loss.forward = forward  # type: ignore[method-assign]


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def without_time(path: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record.pop("seconds", None)
    return records


def test_reduces_the_loss_and_logs_every_update(tmp_path: Path) -> None:
    loss = Regression()
    frozen = loss.frozen.weight.clone()
    result = optimise(loss, stream(), **options(updates=150, out=tmp_path, scheduler=None))
    assert sum(result.losses[-20:]) < 0.5 * sum(result.losses[:20])
    records = without_time(tmp_path / "log.jsonl")
    assert [record["update"] for record in records] == list(range(1, 151))
    assert [record["loss"] for record in records] == result.losses
    assert set(records[0]) == {"update", "loss", "elbo", "steps", "grad_norm", "lr"}
    # each update keeps its own metrics, not those of the log point
    assert all(r["elbo"] == -r["loss"] for r in records)
    assert len({r["steps"] for r in records}) > 100
    assert torch.equal(loss.frozen.weight, frozen)
    assert result.updates == 150
    assert result.seconds > 0


@pytest.mark.parametrize("killed_at", [3, 10, 17, 29])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_resume_is_bit_equal(tmp_path: Path, killed_at: int, ema_decay: float | None) -> None:
    def validate_with(loss: Regression):
        return lambda: {"loss": float(loss(**next(iter(stream().once()))))}

    def run(loss: Regression, out: Path, **changes):
        torch.manual_seed(7)
        return optimise(
            loss,
            stream(),
            **options(
                out=out,
                checkpoint_every=5,
                ema_decay=ema_decay,
                dials={"loss.noise": Anneal(0.3, 0.05, 20)},
                targets={"loss": loss},
                validate=validate_with(loss),
                validate_every=7,
                patience=50,
                **changes,
            ),
        )

    whole = Regression()
    expected = run(whole, tmp_path / "whole")
    killed = Regression()
    kill_after(killed, killed_at)
    with pytest.raises(StopError):
        run(killed, tmp_path / "parts")
    torch.manual_seed(12345)  # the resumed process starts elsewhere
    resumed = Regression()
    result = run(resumed, tmp_path / "parts", resume=True)
    assert result.losses == expected.losses
    assert result.validations == expected.validations
    assert result.best == expected.best
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    assert without_time(tmp_path / "parts" / "log.jsonl") == without_time(tmp_path / "whole" / "log.jsonl")
    newest = "checkpoints/update_00000030/weights.safetensors"
    assert (tmp_path / "parts" / newest).read_bytes() == (tmp_path / "whole" / newest).read_bytes()


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    torch.manual_seed(7)
    whole = Regression()
    expected = optimise(whole, stream(), **options(scheduler=None))
    torch.manual_seed(7)
    first = optimise(Regression(), stream(), **options(updates=12, scheduler=None, out=tmp_path))
    second = Regression()
    result = optimise(second, stream(), **options(scheduler=None, out=tmp_path, resume=True))
    assert first.losses == expected.losses[:12]
    assert result.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(whole), strict=True))


def test_resume_cuts_records_past_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    optimise(Regression(), stream(), **options(updates=10, out=tmp_path, scheduler=None))
    log = tmp_path / "log.jsonl"
    good = log.read_text()
    log.write_text(good + '{"update": 11, "loss": 1.0}\n{"update": 12, "lo')
    result = optimise(Regression(), stream(), **options(updates=10, out=tmp_path, scheduler=None, resume=True))
    assert log.read_text() == good
    assert len(result.losses) == 10


def test_resume_without_a_checkpoint_starts_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"update": 1, "loss": 5.0}\n')
    result = optimise(Regression(), stream(), **options(updates=3, out=tmp_path, resume=True))
    assert len(result.losses) == 3
    assert result.losses[0] != 5.0


@pytest.mark.parametrize("poison_at", [1, 13])
def test_refuses_nan_and_keeps_the_last_good_checkpoint(tmp_path: Path, poison_at: int) -> None:
    loss = Regression(poison_at=poison_at)
    with pytest.raises(
        UserError, match=f"loss: the loss is nan at update {poison_at}; lower the learning rate"
    ) as caught:
        optimise(loss, stream(), **options(out=tmp_path, checkpoint_every=6, log_every=5))
    assert "\n" not in str(caught.value)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("*"))
    assert saved == ([] if poison_at == 1 else ["update_00000006", "update_00000012"])
    assert ("last good checkpoint" in str(caught.value)) == (poison_at == 13)
    records = without_time(tmp_path / "log.jsonl")
    assert all(math.isfinite(record["loss"]) for record in records)
    if poison_at == 13:
        healthy = optimise(Regression(), stream(), **options(out=tmp_path, resume=True))
        assert all(math.isfinite(value) for value in healthy.losses)


def test_refuses_an_infinite_gradient() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.weight.sqrt()

    with pytest.raises(UserError, match="the gradient is inf at update 1"):
        optimise(Root(), stream(), **options(grad_clip=None, log_every=1))


def test_dials_follow_their_schedule_and_are_logged() -> None:
    loss = Regression()
    result = optimise(
        loss, stream(), **options(dials={"loss.noise": Anneal(1.0, 0.0, 10)}, targets={"loss": loss}, updates=12)
    )
    assert [record["loss.noise"] for record in result.trace] == pytest.approx([1 - i / 10 for i in range(10)] + [0, 0])
    assert loss.noise == 0.0


def test_stops_early_and_restores_the_best_module() -> None:
    loss = Regression()
    scores = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    seen: list[list[torch.Tensor]] = []

    def validate() -> dict[str, float]:
        assert not torch.is_grad_enabled()
        seen.append(weights(loss))
        return {"score": next(scores)}

    result = optimise(
        loss, stream(), **options(validate=validate, validate_every=2, patience=3, monitor="score", updates=100)
    )
    assert result.stopped_early
    assert result.updates == 10
    assert result.best == {"update": 4, "score": 1.0}
    assert all(torch.equal(a, b) for a, b in zip(weights(loss), seen[1], strict=True))


def test_validation_does_not_disturb_training() -> None:
    torch.manual_seed(0)
    plain = optimise(Regression(), stream(), **options())
    torch.manual_seed(0)
    draws: list[float] = []

    def validate() -> dict[str, float]:
        draws.append(float(torch.randn(())))
        return {"loss": 0.0}

    checked = optimise(Regression(), stream(), **options(validate=validate, validate_every=3))
    assert plain.losses == checked.losses
    assert len(draws) == 10
    assert len(set(draws)) == 1  # common random numbers


def test_the_module_ends_as_the_average_of_its_parameters() -> None:
    loss = Regression()
    averages = [p.detach().clone() for p in loss.net.parameters()]
    history: list[list[torch.Tensor]] = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            value = super().step(closure)
            history.append([p.detach().clone() for p in loss.net.parameters()])
            return value

    optimise(loss, stream(), **options(optimizer=partial(Spy, lr=0.1), scheduler=None, ema_decay=0.8))
    for update, values in enumerate(history):
        decay = min(0.8, (1 + update) / (10 + update))
        averages = [decay * a + (1 - decay) * v for a, v in zip(averages, values, strict=True)]
    for parameter, average in zip(loss.net.parameters(), averages, strict=True):
        torch.testing.assert_close(parameter.detach(), average)


def test_autocast_runs_the_loss_in_the_dtype_asked_for() -> None:
    seen: list[torch.dtype] = []

    class Spy(Regression):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append(self.net(x).dtype)
            return super().forward(x, y)

    optimise(Spy(), stream(), **options(updates=2, autocast_dtype=torch.bfloat16))
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"updates": 0}, "updates"),
        ({"log_every": 0}, "log_every"),
        ({"grad_clip": -1.0}, "grad_clip"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"autocast_dtype": torch.float16}, "autocast_dtype"),
        ({"patience": 2}, "patience"),
        ({"resume": True}, "resume"),
        ({"dials": {"guide.temperature": Anneal(1, 0.1, 5)}}, "guide.temperature"),
        ({"validate": lambda: {"nelbo": 1.0}}, "monitor"),
    ],
)
def test_refuses_bad_options(changes: dict[str, object], field: str) -> None:
    with pytest.raises(UserError) as caught:
        optimise(Regression(), stream(), **options(**changes))
    assert caught.value.field == field


def test_refuses_a_folder_that_holds_a_run_and_a_module_without_parameters(tmp_path: Path) -> None:
    optimise(Regression(), stream(), **options(updates=2, out=tmp_path))
    with pytest.raises(UserError, match="already holds a run"):
        optimise(Regression(), stream(), **options(updates=2, out=tmp_path))
    with pytest.raises(UserError, match="no parameter that requires a gradient"):
        optimise(Regression().requires_grad_(False), stream(), **options())


def test_refuses_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    optimise(Regression(), stream(), **options(updates=2, out=tmp_path))
    other = Regression()
    other.net[0] = nn.Linear(4, 9)
    with pytest.raises(UserError, match=r"'net.0.weight' has shape \[8, 4\]"):
        optimise(other, stream(), **options(updates=2, out=tmp_path, resume=True))
