"""Files that appear complete or not at all, weights that come back, and locks."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from orderppl.errors import UserError
from orderppl.files import (
    TEMPORARY,
    appearing,
    file_digest,
    load_weights,
    locked,
    read_tensors,
    save_weights,
    write_text,
)


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


def test_weights_come_back_with_tied_tensors(tmp_path: Path) -> None:
    module, other = Tied(), Tied()
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(module, path)
    assert not equal(module, other)
    load_weights(other, path)
    assert equal(module, other)
    assert other.head.weight is other.embed.weight
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]
    other.embed.weight.data += 1
    save_weights(other, path)  # over the old one
    assert not equal(module, other)
    assert torch.equal(read_tensors(path)["head.weight"], other.embed.weight)


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (Tied(width=4), r"'embed.weight' has shape \[5, 3\] .* but \[5, 4\]"),
        (nn.Sequential(nn.Linear(2, 2)), "no tensor '0.weight'"),
        (nn.Embedding(5, 3), "no tensor 'weight'"),
        (nn.Module(), "has a tensor '.*' that this model lacks"),
    ],
)
def test_refuses_another_architecture(tmp_path: Path, module: nn.Module, problem: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(Tied(), path)
    with pytest.raises(UserError, match=problem) as caught:
        load_weights(module, path)
    assert caught.value.field == "checkpoint"
    assert "\n" not in str(caught.value)


def test_refuses_missing_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        load_weights(Tied(), path)
    save_weights(Tied(), path)
    whole = path.read_bytes()
    for damaged in (
        whole[:60],
        b"",
        whole.replace(b'"aliases"', b'"alibis_"'),
        whole.replace(b"embed.weight", b"embed.weighs"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read|no tensor"):
            load_weights(Tied(), path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(Tied(), path)


def test_a_file_appears_complete_or_keeps_its_old_content(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_text(path, "old ä")
    digest = file_digest(path)

    def interrupted() -> None:
        with appearing(path) as temporary:
            temporary.write_text("ne")
            assert temporary.name.startswith(TEMPORARY)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["text"]
    assert path.read_text(encoding="utf-8") == "old ä"
    assert file_digest(path) == digest
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_lock_keeps_other_processes_out_and_goes_with_its_process(tmp_path: Path) -> None:
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
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="out: another process writes into"), locked(folder):
        pass
    with locked(tmp_path / "another"):
        pass
    process.kill()
    process.communicate()
    with locked(folder), locked(folder):  # a second one in this process is none
        pass
    assert not list(folder.iterdir())
