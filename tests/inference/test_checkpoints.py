import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from orderppl.errors import UserError
from orderppl.inference.checkpoints import (
    TEMPORARY,
    CheckpointFolder,
    load_weights,
    read_config,
    save_weights,
)


class Tied(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.config = {"width": width}
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_weights_and_config_come_back_with_tied_tensors(tmp_path: Path) -> None:
    module, other = Tied(), Tied()
    path = save_weights(module, tmp_path / "new" / "denoiser")
    assert path.name == "denoiser.safetensors"
    assert read_config(path) == {"width": 3}
    assert not equal(module, other)
    load_weights(other, path)
    assert equal(module, other)
    assert other.head.weight is other.embed.weight
    assert sorted(file.name for file in path.parent.iterdir()) == ["denoiser.json", "denoiser.safetensors"]


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (Tied(width=4), r"'embed.weight' has shape \[5, 3\] .* but \[5, 4\]"),
        (nn.Sequential(nn.Linear(2, 2)), "no tensor '0.weight'"),
        (nn.Embedding(5, 3), "no tensor 'weight'"),
        (nn.Module(), "has a tensor 'count' that this model lacks"),
    ],
)
def test_refuses_another_architecture(tmp_path: Path, module: nn.Module, problem: str) -> None:
    path = save_weights(Tied(), tmp_path / "weights")
    with pytest.raises(UserError, match=problem) as caught:
        load_weights(module, path)
    assert caught.value.field == "checkpoint"
    assert "\n" not in str(caught.value)


def test_refuses_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_weights(Tied(), tmp_path / "none")
    with pytest.raises(UserError, match="does not exist"):
        read_config(tmp_path / "none")
    path = save_weights(Tied(), tmp_path / "weights")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(Tied(), path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(path)


def test_refuses_other_frozen_parameters(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3).bfloat16().requires_grad_(False), nn.Linear(3, 2))
    folder = CheckpointFolder(tmp_path)
    folder.save(1, module, {})
    assert folder.load(module) is not None
    before = module[1].weight.detach().clone()
    with torch.no_grad():
        module[1].weight.zero_()
        module[0].bias[0] += 1
    with pytest.raises(UserError, match=r"frozen '0.bias' has other values than when .*; load the denoiser"):
        folder.load(module)
    assert not module[1].weight.any() and before.any()  # nothing is loaded


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    """They come from where they came from, such as a public model of any size; buffers are stored."""
    folder, module = CheckpointFolder(tmp_path / "checkpoints"), Tied()
    module.embed.requires_grad_(False)  # and with it the head's weight, which is the same
    path = folder.save(1, module, {})
    assert sorted(load_file(path / "weights.safetensors")) == ["count", "head.bias"]
    fresh = Tied()
    fresh.embed.load_state_dict(module.embed.state_dict())
    fresh.embed.requires_grad_(False)
    assert folder.load(fresh) is not None
    assert torch.equal(fresh.head.bias, module.head.bias)
    thawed = Tied()
    with pytest.raises(UserError, match=r"has no tensor 'embed.weight'"):
        folder.load(thawed)
    thawed.requires_grad_(True)
    CheckpointFolder(tmp_path / "whole").save(1, thawed, {})
    fresh.requires_grad_(False)  # what an older version stored is still read
    assert CheckpointFolder(tmp_path / "whole").load(fresh) is not None
    assert equal(fresh, thawed)


def test_keeps_the_newest_and_returns_state(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    module = Tied()
    assert folder.load(module) is None
    for update in (10, 20, 9, 100):
        with torch.no_grad():
            module.head.bias.fill_(update)
        folder.save(update, module, {"update": update, "rng": torch.get_rng_state()}, best=module.state_dict())
    assert sorted(path.name for path in folder.path.iterdir()) == ["update_00000020", "update_00000100"]
    fresh = Tied()
    loaded = folder.load(fresh)
    assert loaded is not None
    state, best = loaded
    assert state["update"] == 100
    assert equal(fresh, module)
    assert best is not None
    assert best["head.bias"].tolist() == [100.0] * 5
    meta = json.loads((folder.path / "update_00000100" / "meta.json").read_text())
    assert meta["tensors"]["embed.weight"] == [5, 3]


def test_a_crash_between_any_two_file_operations_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail at the 1st, 2nd, ... rename or sync of a save; the newest complete checkpoint must load every time."""
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

    for module_name, name in (("os", "replace"), ("os", "fsync"), ("shutil", "rmtree"), ("torch", "save")):
        owner = getattr(checkpoints, module_name)
        monkeypatch.setattr(owner, name, crashing(getattr(owner, name)))

    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    module = Tied()
    folder.save(1, module, {"update": 1})
    crashes = 0
    for place in range(1, 60):
        update = place + 1
        with torch.no_grad():
            module.head.bias.fill_(update)
        before = folder.latest()
        assert before is not None
        calls["left"] = place
        try:
            folder.save(update, module, {"update": update})
        except CrashError:
            crashes += 1
        finished = calls["left"] > 0
        calls["left"] = 0
        fresh = Tied()
        loaded = CheckpointFolder(folder.path).load(fresh)
        assert loaded is not None
        assert loaded[0]["update"] in (int(before.name[7:]), update)
        assert fresh.head.bias.tolist() == [float(loaded[0]["update"])] * 5 or loaded[0]["update"] == 1
        if finished:
            break
    assert finished
    assert crashes >= 10


def test_what_a_killed_run_left_behind_is_ignored_and_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    module = Tied()
    folder.save(5, module, {"update": 5})
    left = folder.path / f"{TEMPORARY}update_00000009"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"half")
    loaded = folder.load(Tied())
    assert loaded is not None
    assert loaded[0]["update"] == 5
    folder.save(9, module, {"update": 9})
    assert sorted(path.name for path in folder.path.iterdir()) == ["update_00000005", "update_00000009"]


def test_state_is_never_unpickled(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    path = folder.save(1, Tied(), {"update": 1})

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"update": Evil()}, path / "state.pt")
    with pytest.raises(UserError, match="cannot be read"):
        folder.load(Tied())
    assert not (tmp_path / "touched").exists()
