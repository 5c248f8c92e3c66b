"""Run folders: one kind, whoever made them. What they hold is loaded, checked and shared here.

config.yaml          class paths and arguments of everything that the run is made of
run.json             its kind, versions, finished updates, digests of the other two, what the denoiser is
weights.safetensors  what was learned
log.jsonl, checkpoints/, results/
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from orderppl.config import Builder, describe
from orderppl.data.tokenizers import Tokenizer
from orderppl.documents import dump_yaml, read_yaml
from orderppl.errors import UserError, first_line
from orderppl.files import TEMPORARY, check_shapes, file_digest, read_tensors, write_tensors, write_text
from orderppl.hub import fetch
from orderppl.identity import check_denoiser, identity_of, is_loaded, tensors_of
from orderppl.import_paths import locate

CONFIG, INFO, WEIGHTS = "config.yaml", "run.json", "weights.safetensors"
DENOISER = "denoiser"  # folder in a shared order: the denoiser, where nothing else could name it
LOADER = "orderppl.models.denoisers.load_denoiser"  # which reads run folders
FORMAT = 1
FREE = ("updates", "accumulate", "device", "log_every", "validate_every", "checkpoint_every", "progress", "bfloat16")
"""Settings of a fit that may be others when it goes on."""
Kind = Literal["order", "denoiser", "policy"]


# ---- writing


def start_run(
    folder: Path, kind: Kind, parts: Mapping[str, Any], *, resume: bool = False, info: Mapping[str, Any] | None = None
) -> None:
    """Write what a run is made of, before it begins. Call it under the lock of the folder.

    Args:
        folder: made when there is none; what killed processes left half-written in it is removed.
        kind: "order", of the parts `model`, `guide`, `objective`, `data`, `fit`; "denoiser", of `denoiser`, `data`,
            `fit`; "policy", of `policy`, `num_steps`, `mode`, `denoiser`.
        parts: the objects. Data that no config can describe, such as tensors, are left out of it.
        resume: go on with the run in the folder, which must be made of the same; start one when there is none.
        info: more for run.json, JSON values.

    Raises:
        UserError: an object that cannot be described, or another run to resume.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"*/{TEMPORARY}*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    data = parts.get("data")
    plain = {} if data is None or "_made_by" in getattr(data, "__dict__", {}) else {"data": None}
    config = describe({**parts, **plain})
    if "fit" in config:
        config["fit"] = (config["fit"] or {}).get("init_args", {})
    if kind == "denoiser":
        config["denoiser"] = _trained_from(config["denoiser"])
    updates = 0
    if resume and (folder / CONFIG).is_file():
        _check_same(read_yaml(folder / CONFIG, CONFIG), config, "")
        updates = _read_info(folder)["updates"]
    else:
        (folder / WEIGHTS).unlink(missing_ok=True)
    denoiser = parts["denoiser"] if "denoiser" in parts else getattr(parts["model"], "denoiser", None)
    response = {name: getattr(data, name, None) for name in ("length", "prompt_length", "separator_index")}
    write_text(folder / CONFIG, dump_yaml(config))
    identity = None if denoiser is None else identity_of(denoiser)
    if identity is not None and kind == "denoiser":  # it is kept here
        identity |= {"name": None, "weights": None}
    about = {"kind": kind, "updates": updates, "denoiser": identity, "response": response}
    _write_info(folder, {**about, **(info or {})})


def finish_run(folder: Path, parts: Mapping[str, Any], updates: int = 0) -> None:
    """Write what a run has learned.

    Args:
        folder: of `start_run`.
        parts: the same objects.
        updates: number of finished updates.
    """
    state = learned_state(parts, bool(getattr(parts.get("fit"), "train_denoiser", False)))
    floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    dtype = str(floats[0] if floats else torch.get_default_dtype()).removeprefix("torch.")
    info = _read_info(folder)
    write_tensors(folder / WEIGHTS, state)
    _write_info(folder, {**info, "updates": updates, "dtype": dtype})


def _write_info(folder: Path, info: Mapping[str, Any]) -> None:
    from orderppl import __version__

    digests = {name: file_digest(folder / name) for name in (CONFIG, WEIGHTS) if (folder / name).is_file()}
    versions = {"orderppl": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
    document = {"format": FORMAT, **info, "versions": versions, "digests": digests}
    write_text(folder / INFO, json.dumps(document, indent=1) + "\n")


def _check_same(before: Any, now: Any, path: str) -> None:
    """Refuse to go on with a run that is made of something else, and name the first difference."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if path != "fit" or key not in FREE:
                _check_same(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif before != now:
        place = path.replace(".init_args", "").replace(".class_path", "")
        raise UserError(place, f"is {now!r}, the interrupted run has {before!r}", "resume with the same settings")


def _trained_from(spec: dict[str, Any]) -> dict[str, Any]:
    """The class of a denoiser that is trained on, where a run folder names it: the new run does without the old one."""
    source = Path(str(spec.get("init_args", {}).get("name_or_path")))
    if spec["class_path"].endswith("load_denoiser") and (source / INFO).is_file():
        return dict(read_yaml(source / CONFIG, CONFIG)["denoiser"])
    return spec


def learned_state(parts: Mapping[str, Any], train_denoiser: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers of what a run learns, by their names.

    Args:
        parts: the objects.
        train_denoiser: a denoiser that is loaded from elsewhere is trained, too; it is left out otherwise.
    """
    names = ("policy",) if "policy" in parts else ("model", "guide") if "model" in parts else ("denoiser",)
    own = {f"{name}.{key}": tensor for name in names for key, tensor in tensors_of(parts[name])}
    denoiser = getattr(parts.get("model"), "denoiser", None)
    if train_denoiser or not is_loaded(denoiser):
        return own
    frozen = {id(tensor) for _, tensor in tensors_of(denoiser)}
    return {name: tensor for name, tensor in own.items() if id(tensor) not in frozen}


# ---- reading


@dataclass(repr=False)
class Run:
    """What a run folder holds.

    Attributes:
        folder: where it is.
        kind: "order" (a fit), "denoiser" (a training), "policy" (shared).
        config: config.yaml.
        info: run.json.
        denoiser: in evaluation mode; None where a model has none.
        policy: what decodes; None of a denoiser's run.
        model: of a fit.
        guide: of a fit.
        builder: makes what the config describes.
    """

    folder: Path
    kind: Kind
    config: dict[str, Any]
    info: dict[str, Any]
    denoiser: Any = None
    policy: Any = None
    model: Any = None
    guide: Any = None
    builder: Builder = field(default_factory=Builder)

    def __repr__(self) -> str:
        held = "" if self.policy is None else f", {type(self.policy).__name__} for {self.num_steps} steps"
        return f"Run({str(self.folder)!r}: {self.kind}{held}, {self.info.get('updates', 0)} updates)"

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def num_steps(self) -> int:
        """The step budget T that the order was learned for."""
        return int(self.config["num_steps"] if self.kind == "policy" else self.model.num_steps)

    @property
    def mode(self) -> bool:
        """Whether the most probable set of every step is to be played, not a draw."""
        return bool(self.config.get("mode", True))

    @cached_property
    def data(self) -> Any:
        """Its data set, read with the tokeniser of its denoiser; None where it was fitted to tensors."""
        data = self.builder.make(self.config.get("data"), "data")
        if data is not None:
            data.splits(self.tokenizer)
        return data

    @cached_property
    def objective(self) -> Any:
        """Of a fit."""
        return self.builder.make(self.config.get("objective"), "objective")

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of its denoiser."""
        return getattr(self.denoiser, "tokenizer", None)


def load_run(folder: str | Path, *, denoiser: Any = None, trust: bool | None = None, device: str = "cpu") -> Run:
    """Load what a fit, a training of a denoiser, or `share` has left in a folder.

    Args:
        folder: of the run.
        denoiser: use this one; made from its description when left out.
        trust: make objects of any class that the config names, and run code that comes with a denoiser. Left out: of
            folders that are runs of this machine, not of shared orders and downloaded ones.
        device: where model, guide, policy and denoiser go.

    Raises:
        UserError: it is no run folder, has not been finished, is damaged, or does not belong to the denoiser.
    """
    folder = Path(folder)
    if not (folder / INFO).is_file():
        raise UserError(
            "run", f"{folder} holds no {INFO}", "give a folder that fit-order, fit(..., out=...) or share made"
        )
    info = _read_info(folder)
    kind = info["kind"]
    for name in (CONFIG, WEIGHTS):
        if name not in info["digests"]:
            raise UserError("run", f"{folder} is not finished: it has no {name}", "go on with it by --resume")
        if not (folder / name).is_file() or file_digest(folder / name) != info["digests"][name]:
            problem = f"{folder / name} is not the file that {INFO} was written for"
            raise UserError("run", problem, "restore it, or run again with --resume")
    config = read_yaml(folder / CONFIG, "run")
    trust = kind != "policy" and not _is_downloaded(folder) if trust is None else trust
    run = Run(folder, kind, config, info, builder=Builder(trust=trust))
    dtype = getattr(torch, info.get("dtype", "float32"))
    with default_dtype(dtype):
        try:
            parts = _make(run, denoiser)
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"{folder / CONFIG} does not describe a run ({type(error).__name__}: {first_line(error)})"
            raise UserError("run", problem, "restore it, or run again") from error
    wanted = learned_state(parts, bool(config.get("fit", {}).get("train_denoiser", False)))
    saved = read_tensors(folder / WEIGHTS)
    shapes = [{name: list(tensor.shape) for name, tensor in state.items()} for state in (saved, wanted)]
    check_shapes(shapes[0], shapes[1], folder / WEIGHTS)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])
    if kind == "denoiser" and is_loaded(run.denoiser):  # what it was trained from does not have its weights
        object.__setattr__(run.denoiser, "_made_by", (locate(LOADER), (str(folder),), {}))
    for thing in (run.model, run.guide, run.policy, run.denoiser):
        if isinstance(thing, nn.Module):
            thing.to(device).eval()
    if isinstance(run.denoiser, nn.Module):
        run.denoiser.requires_grad_(False)
    return run


def _make(run: Run, denoiser: Any) -> dict[str, Any]:
    """Make the objects of a run, without their weights; those that have some of their own, by their names."""
    config, builder = run.config, run.builder
    spec = config["model"].get("init_args", {}).get("denoiser") if run.kind == "order" else config.get("denoiser")
    given = denoiser
    if given is None and (run.folder / DENOISER / INFO).is_file():
        given = load_run(run.folder / DENOISER, trust=builder.trust).denoiser
    if given is not None:
        check_denoiser(run.info["denoiser"], given, run.folder, weights=False)
        builder.put(spec, given)
    if run.kind == "order":
        run.model, run.guide = builder.make(config["model"], "model"), builder.make(config["guide"], "guide")
        run.denoiser, run.policy = getattr(run.model, "denoiser", None), policy_of(run.model, run.guide)
        parts = {"model": run.model, "guide": run.guide}
    else:
        run.denoiser = given if spec is None else builder.make(spec, "denoiser")
        run.policy = builder.make(config.get("policy"), "policy")
        parts = {"denoiser": run.denoiser} if run.kind == "denoiser" else {"policy": run.policy}
    if given is None and run.denoiser is not None:
        check_denoiser(run.info["denoiser"], run.denoiser, run.folder)
    return parts


def policy_of(model: Any, guide: Any) -> Any:
    """What decodes after a fit: the model's policy if it was learned, else what the guide can be deployed as.

    Args:
        model: with a `policy`.
        guide: see `Guide.deployable`.
    """
    own = getattr(model, "policy", None)
    if own is not None and any(True for _ in own.parameters()):
        return own
    deployable = guide.deployable() if hasattr(guide, "deployable") else None
    return own if deployable is None else deployable


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] != FORMAT:
            raise UserError(
                "run", f"{path} has format {info['format']}, this version reads {FORMAT}", "update orderppl"
            )
        if info["kind"] not in ("order", "denoiser", "policy") or not isinstance(info["digests"], dict):
            raise ValueError("unknown kind")
        if not isinstance(info["denoiser"], dict | None):
            raise ValueError("no denoiser")
        if getattr(torch, info.get("dtype", "float32")) not in (
            torch.float32,
            torch.float64,
            torch.bfloat16,
            torch.float16,
        ):
            raise ValueError("unknown dtype")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{path} is damaged ({type(error).__name__}: {first_line(error)})"
        raise UserError("run", problem, "restore it, or run again with --resume") from error
    return dict(info)


def _is_downloaded(folder: Path) -> bool:
    from huggingface_hub import constants

    return folder.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new modules of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_order(
    name_or_path: str | Path,
    denoiser: Any = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> Run:
    """Load a learned order, of the hub or of a folder: one that was shared, or a whole run.

        order = load_order("OWNER/NAME")
        decode(order.denoiser, order.policy, batch, max_steps=order.num_steps, mode=order.mode)

    Args:
        name_or_path: a folder or a hub name.
        denoiser: to use it with; that which it was learned for when left out.
        revision: branch, tag or commit on the hub.
        trust_remote_code: make objects of classes outside orderppl and torch.nn, and run code that comes with the
            denoiser.
        device: where policy and denoiser go.

    Raises:
        UserError: there is no such order, it is damaged, not trusted, or was learned for another denoiser.
    """
    files = (CONFIG, INFO, WEIGHTS, *(f"{DENOISER}/{name}" for name in (CONFIG, INFO, WEIGHTS)))
    folder = fetch(name_or_path, revision, files=files, field="order")
    return load_run(folder, denoiser=denoiser, trust=True if trust_remote_code else None, device=device)
