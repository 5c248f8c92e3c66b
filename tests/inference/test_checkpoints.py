"""Checkpoints survive crashes, hold what is learned and refuse what does not belong to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orderppl.errors import UserError
from orderppl.files import TEMPORARY
from orderppl.inference.checkpoints import CheckpointFolder, load_module_state, module_state


class Tied(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def state(update: int, module: nn.Module) -> dict[str, Any]:
    return {"update": update, "module": module_state(module), "rng": torch.get_rng_state()}


def load(folder: CheckpointFolder, module: nn.Module) -> dict[str, Any]:
    found = folder.load()
    assert found is not None
    load_module_state(module, found["module"])
    return found


def test_refuses_another_architecture(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1, Tied()))
    with pytest.raises(UserError, match=r"'embed.weight' has shape \[5, 3\] in the checkpoint but \[5, 4\]"):
        load(folder, Tied(width=4))


def test_refuses_other_frozen_parameters(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3).bfloat16().requires_grad_(False), nn.Linear(3, 2))
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1, module))
    load(folder, module)
    before = module[1].weight.detach().clone()
    with torch.no_grad():
        module[1].weight.zero_()
        module[0].bias[0] += 1
    with pytest.raises(UserError, match=r"frozen '0.bias' has other values than when .*; load the denoiser"):
        load(folder, module)
    assert not module[1].weight.any() and before.any()  # nothing is loaded


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    """They come from where they came from, such as a public model of any size; buffers are stored."""
    folder, module = CheckpointFolder(tmp_path / "checkpoints"), Tied()
    module.embed.requires_grad_(False)  # and with it the head's weight, which is the same
    path = folder.save(state(1, module))
    assert sorted(torch.load(path, weights_only=True)["module"]["learned"]) == ["count", "head.bias"]
    fresh = Tied()
    fresh.embed.load_state_dict(module.embed.state_dict())
    fresh.embed.requires_grad_(False)
    load(folder, fresh)
    assert torch.equal(fresh.head.bias, module.head.bias)
    thawed = Tied()
    with pytest.raises(UserError, match=r"has no tensor 'embed.weight'"):
        load(folder, thawed)
    thawed.requires_grad_(True)
    whole = CheckpointFolder(tmp_path / "whole")
    whole.save(state(1, thawed))
    fresh.requires_grad_(False)
    load(whole, fresh)
    assert equal(fresh, thawed)


def test_keeps_the_newest_and_returns_state(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    module = Tied()
    assert folder.load() is None
    for update in (10, 20, 9, 100):
        with torch.no_grad():
            module.head.bias.fill_(update)
        folder.save(state(update, module))
    drawn = torch.get_rng_state()
    assert sorted(path.name for path in folder.path.iterdir()) == ["update_00000020.pt", "update_00000100.pt"]
    fresh = Tied()
    found = load(folder, fresh)
    assert found["update"] == 100
    assert equal(fresh, module)
    assert torch.equal(found["rng"], drawn)
    assert found["module"]["shapes"]["embed.weight"] == [5, 3]


def test_a_crash_between_any_two_file_operations_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail at the 1st, 2nd, ... file operation of a save; the newest complete checkpoint must load every time."""
    import orderppl.files
    import orderppl.inference.checkpoints as checkpoints

    class CrashError(Exception):
        pass

    calls = {"left": 0}

    def crashing(function):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise CrashError
            return function(*args, **kwargs)

        return call

    assert orderppl.files.os is checkpoints.os
    for owner, name in ((checkpoints.os, "replace"), (checkpoints.os, "fsync"), (checkpoints.os, "remove")):
        monkeypatch.setattr(owner, name, crashing(getattr(owner, name)))

    def half(function):  # a torch.save that writes a part
        def call(value, path):
            function(value, path)
            calls["left"] -= 1
            if calls["left"] == 0:
                Path(path).write_bytes(Path(path).read_bytes()[:500])
                raise CrashError

        return call

    monkeypatch.setattr(checkpoints.torch, "save", half(torch.save))

    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    module = Tied()
    folder.save(state(1, module))
    crashes = 0
    for place in range(1, 60):
        update = place + 1
        with torch.no_grad():
            module.head.bias.fill_(update)
        before = folder.latest()
        assert before is not None
        calls["left"] = place
        try:
            folder.save(state(update, module))
        except CrashError:
            crashes += 1
        finished = calls["left"] > 0
        calls["left"] = 0
        fresh = Tied()
        found = load(CheckpointFolder(folder.path), fresh)
        assert found["update"] in (int(before.stem[7:]), update)
        assert fresh.head.bias.tolist() == [float(found["update"])] * 5 or found["update"] == 1
        if finished:
            break
    assert finished
    assert crashes >= 5


def test_what_a_killed_run_left_behind_is_ignored_and_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    module = Tied()
    folder.save(state(5, module))
    (folder.path / f"{TEMPORARY}77-update_00000009.pt").write_bytes(b"half")
    assert load(folder, Tied())["update"] == 5
    folder.save(state(9, module))
    assert sorted(path.name for path in folder.path.iterdir()) == ["update_00000005.pt", "update_00000009.pt"]


def test_state_is_never_unpickled_and_damage_is_told(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    path = folder.save(state(1, Tied()))

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    whole = path.read_bytes()
    torch.save({"update": Evil()}, path)
    with pytest.raises(UserError, match="cannot be read") as caught:
        folder.load()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "touched").exists()
    for damaged in (b"", whole[: len(whole) // 2], b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            folder.load()
