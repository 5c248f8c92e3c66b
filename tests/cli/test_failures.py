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
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from orderppl import load_order, load_run
from orderppl.cli.failures import explain
from orderppl.cli.main import main
from orderppl.errors import UserError
from orderppl.files import TEMPORARY, write_tensors, write_text

from tiny_models import write_model, write_tokenizer

DATA = ["--data=Arithmetic", "--data.train=32", "--data.validation=8", "--data.test=8", "--data.num_operations=2"]
POLICY = ["--policy=LearnedPolicy", "--policy.network=PolicyNetwork", "--policy.network.width=8", "--guide=PolicyGuide"]
QUICK = ["--num_steps=3", "--fit.updates=2", "--fit.batch_size=4", "--fit.progress=false"]
QUICK += ["--objective=RevealTraceGraph_ELBO", "--objective.num_particles=2"]


def fit(model: str, *options: str) -> list[str]:
    denoiser = ["--denoiser=load_denoiser", f"--denoiser.name_or_path={model}"]
    return ["fit-order", *DATA, *denoiser, *POLICY, *QUICK, *options]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, a fitted order and its shared folder, all intact."""
    root = tmp_path_factory.mktemp("intact")
    torch.manual_seed(0)
    for kind in ("bert", "roberta", "smdm", "llada", "Dream"):
        write_model(root / kind, kind)
    assert main(fit(str(root / "bert"), "--out", str(root / "run"))) == 0
    assert main(["share", str(root / "run"), "--out", str(root / "order")]) == 0
    return root


@pytest.fixture
def here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to break copies in."""
    for name in ("bert", "roberta", "smdm", "llada", "Dream", "run", "order"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_line(capfd: pytest.CaptureFixture[str]) -> str:
    """The last thing a command said."""
    said = capfd.readouterr().err.replace("\r", "\n")
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
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


def other_mask() -> None:
    known = json.loads(Path("order/run.json").read_text())["denoiser"]
    edit("order/run.json", denoiser={**known, "mask_index": 7})


def other_tokenizer() -> None:
    write_tokenizer(Path("other"), [f"<{n}>" for n in range(40)], mask_token="<1>", eos_token="<2>")


def nothing() -> None: ...


GENERATE = ["generate", "order", "--prompt", "2 + 3 =", "--length", "4"]
READ = ["--denoiser=load_denoiser", "--denoiser.name_or_path"]
CASES: dict[str, tuple[Callable[[], None], list[str], str]] = {
    # what is broken, the command, what it says
    "no such folder": (nothing, fit("./nowhere"), "denoiser: './nowhere' is neither a folder here"),
    "offline": (nothing, fit("nobody/model"), "denoiser: nobody/model is neither a folder"),
    "remote code": (nothing, fit("llada"), "trust_remote_code"),
    "truncated": (lambda: cut("bert/model.safetensors"), fit("bert"), "denoiser: "),
    "truncated smdm": (lambda: cut("smdm/model.safetensors"), fit("smdm"), "cannot be read"),
    "truncated remote": (
        lambda: cut("Dream/model.safetensors"),
        fit("Dream", "--denoiser.trust_remote_code"),
        "cannot be read",
    ),
    "pickled": (pickled, fit("bert"), "no safetensors weights"),
    "no config": (lambda: remove("bert/config.json"), fit("bert"), "denoiser: bert has no readable config.json"),
    "large config": (
        lambda: edit("bert/config.json", note="x" * 2**20),
        fit("bert"),
        "bert has no readable config.json",
    ),
    "no kind": (lambda: edit("bert/config.json", drop="model_type"), fit("bert"), "is no masked model"),
    "wrong size": (lambda: edit("bert/config.json", hidden_size=32, intermediate_size=64), fit("bert"), "has shape"),
    "too deep": (
        lambda: edit("bert/config.json", num_hidden_layers=10**12),
        fit("bert"),
        "wants num_hidden_layers",
    ),
    "too wide": (lambda: edit("bert/config.json", hidden_size=10**12), fit("bert"), "wants hidden_size"),
    "no tokenizer": (lambda: remove("bert/tok*"), fit("bert"), "tokenizer: bert cannot be loaded"),
    "no mask token": (nothing, fit("bert", "--denoiser.tokenizer_from=smdm"), "smdm has no mask token"),
    "other vocabulary": (other_tokenizer, fit("bert", "--denoiser.tokenizer_from=other"), "other has 79 tokens"),
    "other denoiser": (nothing, [*GENERATE, *READ, "smdm"], "token classes, order was learned for 44"),
    "other mask": (other_mask, [*GENERATE, *READ, "bert"], "has 4 as MASK, order was learned for 7"),
    "newer order": (lambda: edit("order/run.json", format=2), GENERATE, "has format 2, this version reads 1"),
    "cut weights": (lambda: cut("order/weights.safetensors"), GENERATE, "order/weights.safetensors is not the file"),
    "cut config": (lambda: cut("order/config.yaml"), GENERATE, "order/config.yaml is not the file"),
    "cut info": (lambda: cut("order/run.json"), GENERATE, "order/run.json is damaged"),
    "no order": (nothing, ["generate", "bert", "--prompt=x"], "bert holds no run.json"),
    "too long": (nothing, [*GENERATE[:-1], "9999"], "tokens"),
    "share no run": (nothing, ["share", "bert", "--out=new"], "run: bert holds no run.json"),
    "share nothing": (nothing, ["share", "nowhere", "--out=new"], "run: nowhere holds no run.json"),
    "cut run": (
        lambda: cut("run/weights.safetensors"),
        ["share", "run", "--out=new"],
        "run/weights.safetensors is not",
    ),
    "no data": (
        nothing,
        ["train-denoiser", "--data=Gsm8k", "--data.source=nowhere"],
        "data: 'nowhere' is no local path",
    ),
    "no device": (nothing, fit("bert", "--device", "cuda:99"), "device: cannot use 'cuda:99'"),
    "out of memory": (nothing, fit("bert", "--objective.num_particles=10000000000000"), "memory: cpu has none left"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    breaks, arguments, said = CASES[name]
    breaks()
    out = ["--out", "new"] if arguments[0] in ("fit-order", "train-denoiser") else []
    assert main([*arguments, *out]) == 2
    assert said in only_line(capfd)
    new = [path.name for path in here.glob("new/**/*")]
    assert "weights.safetensors" not in new
    assert not [path for path in here.iterdir() if path.name.startswith(TEMPORARY)]


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
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = QuietServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "cache").mkdir()
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
        ("owner/partial/a.safetensors", "has no such file", "one of https://huggingface.co/owner/partial/tree/v2"),
        ("owner/busy", "cannot be downloaded (", "try again, or download it where there is a network"),
        ("owner/gone", "cannot be downloaded (Server disconnected", "is a network (hf download owner/gone)"),
    ],
)
def test_one_line_from_the_hub(
    hub: None, here: Path, capfd: pytest.CaptureFixture[str], model: str, problem: str, remedy: str
) -> None:
    assert main(fit(model, "--denoiser.revision=v2", "--out", "new")) == 2
    line = only_line(capfd)
    name = "/".join(model.split("/")[:2])
    assert line.startswith("error: denoiser")
    assert f"{name} {problem}" in line
    assert remedy in line
    assert not (here / "new").exists()


def test_an_order_of_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is needed is downloaded, and nothing of it is trusted."""
    asked: dict[str, Any] = {}
    cache = here / "cache"
    shutil.copytree(here / "run", cache / "models--a--b" / "snapshots" / "1")

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(cache / "models--a--b" / "snapshots" / "1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    order = load_order("a/b", revision="v1")
    assert (asked["name"], asked["revision"]) == ("a/b", "v1")
    assert asked["allow_patterns"][:3] == ["config.yaml", "run.json", "weights.safetensors"]
    assert torch.equal(order.policy.network.head.weight, load_run("run").policy.network.head.weight)
    config = (cache / "models--a--b" / "snapshots" / "1" / "config.yaml").read_text()
    assert not order.builder.trust  # a whole run, but not of this machine
    assert load_run("run").builder.trust
    assert "load_denoiser" in config
    monkeypatch.undo()
    with pytest.raises(UserError, match="order: nobody/nothing is neither a folder here nor in the local cache"):
        load_order("nobody/nothing")


# ---- what goes wrong on the way


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
    room = (here / "run/config.yaml").stat().st_size + 1500
    assert (here / "run/weights.safetensors").stat().st_size > room
    with full_disk(room):
        assert main(fit("bert", "--fit.checkpoint_every=1", "--out", "new")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: disk: new")
    assert "free some space, then repeat the command, with --resume" in line
    assert [path for path in (here / "new").rglob("*") if path.name.startswith(TEMPORARY)] == []
    assert main(fit("bert", "--out", "new", "--resume")) == 0
    with full_disk(room):
        assert main(["share", "new", "--out", "shared"]) == 2
    assert "error: disk: " in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (here / "shared").exists()
    assert not [path for path in here.iterdir() if path.name.startswith(TEMPORARY)]


@pytest.mark.parametrize("big", ["weights", "text"])
def test_nothing_half_written(tmp_path: Path, big: str) -> None:
    """Every way to write: what was there stays, nothing else does, and the error is known whatever it is wrapped in."""
    size = {name: 20_000 if name == big else 1 for name in ("weights", "text")}
    for name in ("weights", "text"):
        (tmp_path / name).write_text("old")

    def write() -> None:
        write_tensors(tmp_path / "weights", nn.Linear(size["weights"], 1).state_dict())
        write_text(tmp_path / "text", "x" * size["text"])

    with pytest.raises((OSError, RuntimeError, SafetensorError)) as caught, full_disk(10_000):
        write()
    known = explain(caught.value, SimpleNamespace(out=tmp_path, device="cpu"))
    assert known is not None
    assert known.field == "disk"
    assert not list(tmp_path.rglob(TEMPORARY + "*"))
    assert (tmp_path / big).read_text() == "old"


def test_what_is_known() -> None:
    """GPU and disk errors that cannot be had here; anything else keeps its traceback."""
    config = SimpleNamespace(out="runs/x", device="cuda")
    for text in (
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "MPS backend out of memory (MPS allocated: 17 GB)",
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert str(explain(RuntimeError(text), config)).startswith("memory: cuda has none left; lower the batch size")
    assert str(explain(MemoryError(), config)).startswith("memory: ")
    denied = explain(PermissionError(errno.EACCES, "Permission denied", "/x/y"), config)
    assert str(denied) == "out: /x/y: Permission denied; choose a folder that you may write to"
    full = explain(OSError(errno.ENOSPC, "No space left on device"), config)
    assert str(full).startswith(
        "disk: runs/x cannot be written (No space left on device); free some space, then repeat"
    )
    for bug in (RuntimeError("shape mismatch"), KeyError("x"), FileNotFoundError(errno.ENOENT, "No such file", "x")):
        assert explain(bug, config) is None
