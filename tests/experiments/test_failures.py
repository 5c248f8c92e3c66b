"""Every failure a user will meet, from the command line: one line with field and remedy, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from orderppl.experiments import fit_order
from orderppl.experiments.failures import explain
from orderppl.inference.checkpoints import TEMPORARY, CheckpointFolder, write_text

from command_line import call
from tiny_models import write_model, write_tokenizer

SETTINGS = {
    "num_steps": 3,
    "task": {"name": "arithmetic", "train": 32, "validation": 8, "test": 8, "num_operations": 2},
    "prior": {"name": "residual_policy", "network": {"width": 8, "layers": 1, "heads": 2}},
    "guide": "policy",
    "elbo": {"num_particles": 2},
    "fit": {"updates": 4, "batch_size": 4, "validate_every": None, "checkpoint_every": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, a fitted order and its shared folder, all intact."""
    root = tmp_path_factory.mktemp("intact")
    torch.manual_seed(0)
    for kind in ("bert", "roberta", "smdm", "llada", "Dream"):
        write_model(root / kind, kind)
    (root / "fit.yaml").write_text(json.dumps(SETTINGS))
    settings = ("--config", str(root / "fit.yaml"), "--set", "denoiser.name=pretrained")
    assert call("fit-order", *settings, "--set", f"denoiser.model={root / 'bert'}", "--out", str(root / "run")) == 0
    assert call("share", "--run", str(root / "run"), "--out", str(root / "order")) == 0
    return root


@pytest.fixture
def here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to break copies in."""
    for name in ("bert", "roberta", "smdm", "llada", "Dream", "run", "order", "fit.yaml"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_line(capfd: pytest.CaptureFixture[str]) -> str:
    """The last thing a command said; before it stand progress bars, and what the hub's client has to say, at most."""
    said = capfd.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.strip() and "it/s]" not in line]
    assert [line for line in lines[:-1] if "huggingface_hub" not in line and "HF Hub" not in line] == []
    return lines[-1]


def own(name: str) -> Path:
    """A copy of something intact, to break."""
    Path(name).rename("link")
    shutil.copytree("link", name)
    Path("link").unlink()
    return Path(name)


def cut(path: str) -> None:
    """Leave out the end of a file, as a download does that was interrupted."""
    file = own(Path(path).parts[0]) / Path(path).name
    file.write_bytes(file.read_bytes()[:-100])


def edit(path: str, drop: str = "", **changes: Any) -> None:
    """Change fields of a JSON file, or take one out."""
    file = own(Path(path).parts[0]) / Path(path).name
    content = json.loads(file.read_text()) | changes
    content.pop(drop, None)
    file.write_text(json.dumps(content))


def remove(path: str) -> None:
    for file in own(Path(path).parts[0]).glob(Path(path).name):
        file.unlink()


def pickled() -> None:
    remove("bert/model.safetensors")
    Path("bert/pytorch_model.bin").write_bytes(b"pickle")


def other_tokenizer() -> None:
    write_tokenizer(Path("other"), [f"<{n}>" for n in range(40)], mask_token="<1>", eos_token="<2>")


def nothing() -> None: ...


def fit(model: str, *options: str) -> list[str]:
    chosen = ["--set", "denoiser.name=pretrained", "--set", f"denoiser.model={model}"]
    return ["fit-order", "--config", "fit.yaml", *chosen, *options]


GENERATE = ["generate", "--policy", "order", "--prompt", "2 + 3 =", "--length", "4"]
TRUST = ["--set", "denoiser.trust_remote_code=true"]
CASES: dict[str, tuple[Callable[[], None], list[str], str, str]] = {
    # what is broken, the command, field and problem, remedy
    "no such folder": (nothing, fit("./nowhere"), "denoiser: './nowhere' is neither a folder here", "give an existing"),
    "offline": (nothing, fit("nobody/model"), "denoiser: nobody/model is neither a folder", "unset it, or download it"),
    "remote code": (nothing, fit("llada"), "trust_remote_code: llada (llada) runs code", "set trust_remote_code"),
    "truncated": (lambda: cut("bert/model.safetensors"), fit("bert"), "denoiser: bert/model.saf", "download it again"),
    "truncated smdm": (
        lambda: cut("smdm/model.safetensors"),
        fit("smdm"),
        "denoiser: smdm/model.safetensors cannot be read",
        "give a complete safetensors file",
    ),
    "truncated remote": (
        lambda: cut("Dream/model.safetensors"),
        fit("Dream", *TRUST),
        "denoiser: Dream/model.safetensors cannot be read",
        "download it again",
    ),
    "pickled": (pickled, fit("bert"), "denoiser: bert has no safetensors weights (pickled", "convert them"),
    "no config": (
        lambda: remove("bert/config.json"),
        fit("bert"),
        "denoiser: bert has no readable config.json",
        "give",
    ),
    "no kind": (
        lambda: edit("bert/config.json", drop="model_type"),
        fit("bert"),
        "denoiser: bert (of no kind) is no masked model",
        "use one of: any AutoModelForMaskedLM, smdm, llada, Dream",
    ),
    "wrong type": (
        lambda: edit("bert/config.json", hidden_size="wide"),
        fit("bert"),
        "tokenizer: bert cannot be loaded (Validation error for field 'hidden_size'",
        "give a saved WordTokenizer (.json), or a folder",
    ),
    "wrong size": (
        lambda: edit("bert/config.json", hidden_size=32, intermediate_size=64),
        fit("bert"),
        "denoiser: 'bert.embeddings.LayerNorm.bias' of bert has shape [16], its config.json wants [32]",
        "give weights and configuration of one model",
    ),
    "wrong size remote": (
        lambda: edit("Dream/config.json", hidden_size=32),
        fit("Dream", *TRUST),
        "denoiser: 'lm_head.weight' of Dream has shape [64, 16], its config.json wants [64, 32]",
        "give weights and configuration of one model",
    ),
    "no tokenizer": (lambda: remove("bert/tok*"), fit("bert"), "tokenizer: bert cannot be loaded (no vocab", "give a"),
    "no mask token": (
        nothing,
        fit("bert", "--set", "denoiser.tokenizer=smdm"),
        "tokenizer: smdm has no mask token",
        "use the tokeniser of a masked model",
    ),
    "other vocabulary": (
        other_tokenizer,
        fit("bert", "--set", "denoiser.tokenizer=other"),
        "tokenizer: other has 79 tokens, the model has classes for 44",
        "use the tokeniser that the model was trained with",
    ),
    "other denoiser": (
        nothing,
        [*GENERATE, "--denoiser", "smdm"],
        "denoiser: has 42 token classes, the order was learned for 44",
        "learn an order for this one",
    ),
    "other mask": (
        lambda: edit("order/order_policy.json", denoiser={"vocab_size": 44, "mask_index": 7}),
        [*GENERATE, "--denoiser", "bert"],
        "denoiser: has MASK 4, the order was learned for MASK 7",
        "learn an order for this one",
    ),
    "other tokens": (
        nothing,
        [*GENERATE, "--denoiser", "roberta"],
        "denoiser: has other tokens than those",
        "learn an order for this one",
    ),
    "newer policy": (
        lambda: edit("order/order_policy.json", format=2),
        GENERATE,
        "policy: order has format 2, this version reads 1",
        "update orderppl",
    ),
    "cut policy": (
        lambda: cut("order/order_policy.safetensors"),
        GENERATE,
        "policy: the weights of order are not those",
        "save or download it again",
    ),
    "damaged policy": (
        lambda: cut("order/order_policy.json"),
        GENERATE,
        "policy: order_policy.json of order is damaged",
        "save or download it again",
    ),
    "no policy": (
        nothing,
        ["generate", "--policy", "bert"],
        "policy: bert holds no order_policy.json",
        "orderppl share",
    ),
    "too long": (
        nothing,
        [*GENERATE, "--length", "9999"],
        "max_length: a canvas of 10003 tokens exceeds the model's 511",
        "shorten prompt or response",
    ),
    "no order": (nothing, ["share", "--run", "bert"], "run: bert holds no order.safetensors", "run fit-order there"),
    "no run": (nothing, ["share", "--run", "nowhere"], "run: no such file: nowhere", "give the path of an existing"),
    "cut order": (
        lambda: cut("run/order.safetensors"),
        ["share", "--run", "run"],
        "weights: run/order.saf",
        "complete",
    ),
    "frontier": (nothing, ["frontier", "--run", "bert"], "run: bert holds no order.safetensors", "run fit-order there"),
    "no data": (
        nothing,
        ["gsm8k", "--data", "nowhere"],
        "data: 'nowhere' is no local path",
        "give a folder with train",
    ),
    "no device": (nothing, fit("bert", "--device", "cuda:99"), "device: cannot use 'cuda:99'", "choose cpu"),
    "out of memory": (
        nothing,
        fit("bert", "--set", "elbo.num_particles=10000000000000"),
        "memory: cpu has none left",
        "lower the batch size or elbo.num_particles",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    breaks, arguments, problem, remedy = CASES[name]
    breaks()
    before = sorted(here.iterdir())
    assert call(*arguments, "--out", "new") == 2
    line = only_line(capfd)
    assert line.startswith(f"error: {problem}")
    assert remedy in line.partition("; ")[2]
    assert sorted(here.iterdir()) == before


# ---- the hub, as a server on this machine


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does; what goes wrong is in the name of the repository."""

    ERRORS = {
        "private": (401, "RepoNotFound"),
        "gated": (403, "GatedRepo"),
        "old": (404, "RevisionNotFound"),
        "partial": (404, "EntryNotFound"),
        "busy": (500, ""),
    }

    def do_GET(self) -> None:
        name = next(kind for kind in (*self.ERRORS, "gone") if f"/{kind}" in self.path)
        if name == "gone":  # the connection breaks
            self.close_connection = True
            return
        status, kind = self.ERRORS[name]
        if name == "gated" and self.path.startswith("/api/"):  # only its files are
            files = [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]
            content = {"id": "owner/gated", "sha": "0" * 40, "siblings": [{"rfilename": "config.json"}]}
            self.answer(200, "", json.dumps(files if "/tree/" in self.path else content).encode())
        else:
            self.answer(status, kind, b"{}")

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", kind)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None: ...


class QuietServer(ThreadingHTTPServer):
    """Does not tell stderr, which is under test, of clients that hang up."""

    def handle_error(self, request: Any, client_address: Any) -> None: ...


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = QuietServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (here / "cache").mkdir()
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "problem", "remedy"),
    [
        (
            "owner/private",
            "is neither a folder here nor a public model",
            "for a private one log in with: hf auth login",
        ),
        ("owner/gated", "is gated", "accept its terms at https://huggingface.co/owner/gated, then log in"),
        ("owner/old", "has no revision 'v2'", "choose a branch, tag or commit of https://huggingface.co/owner/old/"),
        (
            "owner/partial/a.safetensors",
            "has no such file",
            "choose one of https://huggingface.co/owner/partial/tree/v2",
        ),
        ("owner/busy", "cannot be downloaded (", "try again, or download it where there is a network"),
        (
            "owner/gone",
            "cannot be downloaded (Server disconnected",
            "where there is a network (hf download owner/gone)",
        ),
    ],
)
def test_one_line_from_the_hub(
    hub: None, here: Path, capfd: pytest.CaptureFixture[str], model: str, problem: str, remedy: str
) -> None:
    assert call(*fit(model, "--set", "denoiser.revision=v2"), "--out", "new") == 2
    line = only_line(capfd)
    name = "/".join(model.split("/")[:2])
    assert line.startswith(f"error: denoiser: {name} {problem}")
    assert remedy in line
    assert not (here / "new").exists()


# ---- what goes wrong on the way


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A test run in the background of a shell is born with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_interrupted(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C behind a checkpoint; what it leaves goes on to the end of an uninterrupted run."""
    save = CheckpointFolder.save

    def interrupted(*arguments: Any, **options: Any) -> Path:
        save(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFolder, "save", interrupted)
        assert call(*fit("bert"), "--out", "new") == 130
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted; repeat the command with --resume to go on"
    assert not (here / "new" / "results.json").exists()
    assert call(*fit("bert"), "--out", "new", "--resume") == 0
    assert (here / "new/order.safetensors").read_bytes() == (here / "run/order.safetensors").read_bytes()


@pytest.mark.usefixtures("heeds_interrupts")
def test_interrupted_before_there_is_anything(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_order, "build_problem", lambda config: signal.raise_signal(signal.SIGINT))
    assert call(*fit("bert"), "--out", "new") == 130
    assert not (here / "new").exists()


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a real error of the system, and no disk is filled."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fit whose checkpoint does not fit on the disk; with room it goes on."""
    room = (here / "run/config.yaml").stat().st_size + 100
    assert (here / "run/order.safetensors").stat().st_size > room
    with full_disk(room):
        assert call(*fit("bert"), "--out", "new") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: disk: new")
    assert "(File too large); free some space, then repeat the command with --resume to go on" in line
    assert [path for path in (here / "new").rglob("*") if path.name.startswith(TEMPORARY)] == []
    assert call(*fit("bert"), "--out", "new", "--resume") == 0
    with full_disk(room):
        assert call("share", "--run", "new", "--out", "shared") == 2
    assert "error: disk: " in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (here / "shared").exists()


@pytest.mark.parametrize("big", ["weights", "state", "text"])
def test_nothing_half_written(tmp_path: Path, big: str) -> None:
    """Every way to write: what was there stays, nothing else does, and the error is known whatever it is wrapped in."""
    folder = CheckpointFolder(tmp_path)
    folder.save(1, nn.Linear(1, 1), {})
    sizes = {name: 20_000 if name == big else 1 for name in ("weights", "state", "text")}
    before = sorted(tmp_path.rglob("*"))

    def write() -> None:
        folder.save(2, nn.Linear(sizes["weights"], 1), {"state": torch.zeros(sizes["state"])})
        write_text(tmp_path / "text", "x" * sizes["text"])

    with pytest.raises((OSError, RuntimeError, SafetensorError)) as caught, full_disk(10_000):
        write()
    known = explain(caught.value, tmp_path, "cpu")
    assert known is not None
    assert known.field == "disk"
    if big != "text":
        assert sorted(tmp_path.rglob("*")) == before
    assert not list(tmp_path.rglob(TEMPORARY + "*"))
    assert not (tmp_path / "text").exists()


def test_what_is_known() -> None:
    """GPU and disk errors that cannot be had here; anything else keeps its traceback."""
    out = Path("runs/x")
    for text in (
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "MPS backend out of memory (MPS allocated: 17 GB)",
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert str(explain(RuntimeError(text), out, "cuda")).startswith(
            "memory: cuda has none left; lower the batch size"
        )
    assert str(explain(MemoryError(), out, "cpu")).startswith("memory: ")
    assert str(explain(torch.OutOfMemoryError("CUDA out of memory."), out, "cuda")).startswith("memory: ")
    denied = explain(PermissionError(errno.EACCES, "Permission denied", "/x/y"), out, "cpu")
    assert str(denied) == "--out: /x/y: Permission denied; choose a folder that you may write to"
    full = explain(OSError(errno.ENOSPC, "No space left on device"), out, "cpu")
    assert str(full) == (
        "disk: runs/x cannot be written (No space left on device); free some space, then repeat the command; "
        "or choose another --out"
    )
    for bug in (RuntimeError("shape mismatch"), KeyError("x"), FileNotFoundError(errno.ENOENT, "No such file", "x")):
        assert explain(bug, out, "cpu") is None
