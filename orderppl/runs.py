"""Run folders: one kind, whoever made them. What they hold is loaded, checked and shared here.

    config.yaml          class paths and arguments of everything that the run is made of
    run.json             its kind, versions, finished updates, digests of the other two, what the denoiser is
    weights.safetensors  what was learned
    log.jsonl, checkpoints/, results/
"""

from __future__ import annotations

import hashlib
import json
import os
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
from orderppl.data.tokenizers import Tokenizer, tokenizer_fingerprint
from orderppl.documents import dump_yaml, read_yaml
from orderppl.errors import UserError, first_line
from orderppl.files import TEMPORARY, check_shapes, file_digest, read_tensors, write_tensors, write_text
from orderppl.hub import fetch

CONFIG, INFO, WEIGHTS, CARD = "config.yaml", "run.json", "weights.safetensors", "README.md"
DENOISER = "denoiser"  # folder in a shared order: the denoiser, where nothing else could name it
FORMAT = 1
FREE = ("updates", "accumulate", "device", "log_every", "validate_every", "checkpoint_every", "progress", "bfloat16")
"""Settings of a fit that may be others when it goes on."""
Kind = Literal["order", "denoiser", "policy"]
PARTS = ("denoiser", "model", "guide", "policy")  # that have weights


# ---- writing


def start_run(folder: Path, kind: Kind, parts: Mapping[str, Any], *, resume: bool = False) -> None:
    """Write what a run is made of, before it begins. Call it under the lock of the folder.

    Args:
        folder: made when there is none; what killed processes left half-written in it is removed.
        kind: "order", of the parts `model`, `guide`, `objective`, `data`, `fit`; "denoiser", of `denoiser`, `data`,
            `fit`; "policy", of `policy`, `num_steps`, `mode`, `denoiser`.
        parts: the objects. Data that no config can describe, such as tensors, are left out of it.
        resume: go on with the run in the folder, which must be made of the same; start one when there is none.

    Raises:
        UserError: an object that cannot be described, or another run to resume.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"*/{TEMPORARY}*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    data = parts.get("data")
    described = {name: part for name, part in parts.items() if name != "data" or "_made_by" in getattr(part, "__dict__", {})}
    config = {"data": None, **describe(described)} if "data" in parts else describe(described)
    if "fit" in config:
        config["fit"] = config["fit"].get("init_args", {})
    if resume and (folder / CONFIG).is_file():
        _check_same(read_yaml(folder / CONFIG, CONFIG), config, "")
    denoiser = parts["denoiser"] if "denoiser" in parts else getattr(parts["model"], "denoiser", None)
    info = {
        "kind": kind,
        "updates": 0,
        "denoiser": None if denoiser is None else identity_of(denoiser),
        "response": {name: getattr(data, name, None) for name in ("length", "prompt_length", "separator_index")},
    }
    write_text(folder / CONFIG, dump_yaml(config))
    (folder / WEIGHTS).unlink(missing_ok=True)
    _write_info(folder, info)


def finish_run(folder: Path, parts: Mapping[str, Any], updates: int = 0, **info: Any) -> None:
    """Write what a run has learned.

    Args:
        folder: of `start_run`.
        parts: the same objects.
        updates: number of finished updates.
        **info: more for run.json, JSON values.
    """
    before = _read_info(folder)
    trained = bool(getattr(parts.get("fit"), "train_denoiser", False))
    state = learned_state(parts, trained)
    floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    dtype = str(floats[0] if floats else torch.get_default_dtype()).removeprefix("torch.")
    write_tensors(folder / WEIGHTS, state)
    _write_info(folder, {**before, **info, "updates": updates, "dtype": dtype})


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
        field = path.replace(".init_args", "").replace(".class_path", "")
        raise UserError(field, f"is {now!r}, the interrupted run has {before!r}", "resume with the same settings")


def learned_state(parts: Mapping[str, Any], trained: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers of a run's modules by their names.

    Args:
        parts: the objects.
        trained: keep those of the denoiser; they are left out otherwise when its description loads them.
    """
    own = {f"{name}.{key}": tensor for name in PARTS for key, tensor in _tensors(parts.get(name))}
    denoiser = getattr(parts.get("model"), "denoiser", parts.get("denoiser") if "policy" in parts else None)
    if trained or not _is_loaded(denoiser):
        return own
    frozen = {id(tensor) for _, tensor in _tensors(denoiser)}
    return {name: tensor for name, tensor in own.items() if id(tensor) not in frozen}


def _tensors(thing: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(thing, nn.Module):
        yield from thing.state_dict(keep_vars=True).items()


def _is_loaded(denoiser: Any) -> bool:
    """Whether a function has loaded it, by whose call it is described: its weights are kept elsewhere."""
    maker = getattr(denoiser, "__dict__", {}).get("_made_by", (type(denoiser),))[0]
    return not isinstance(maker, type)


# ---- denoisers


def identity_of(denoiser: Any) -> dict[str, Any]:
    """What must be the same of a denoiser that an order is used with: vocabulary, MASK, tokens; and its weights."""
    tokenizer = getattr(denoiser, "tokenizer", None)
    arguments = getattr(denoiser, "__dict__", {}).get("_made_by", (None, (), {}))[1:]
    name = next(iter(arguments[0]), None) if _is_loaded(denoiser) else None
    return {
        "name": None if name is None else str(name),
        "vocab_size": int(denoiser.vocab_size),
        "mask_index": int(denoiser.mask_index),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "weights": weights_digest(denoiser) if _is_loaded(denoiser) else None,
    }


def weights_digest(module: Any) -> str:
    """Sixteen hexadecimal digits that tell other weights apart: of the sums of the bit patterns, on any device."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: int(tensor.detach().contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in _tensors(module)
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def check_denoiser(known: Mapping[str, Any] | None, denoiser: Any, source: object, weights: bool = True) -> None:
    """Refuse another denoiser than a run was learned for.

    Args:
        known: the run's `identity_of` it.
        denoiser: what is there.
        source: the run, for messages.
        weights: compare the weights too.

    Raises:
        UserError: another vocabulary, MASK or tokeniser, or other weights.
    """
    if known is None:
        return
    found = identity_of(denoiser)
    words = {"vocab_size": "token classes", "mask_index": "as MASK", "tokenizer": "as fingerprint of its tokens"}
    remedy = f"use {known['name'] or 'the one it was learned for'}, or learn an order for this one"
    for name, word in words.items():
        if known[name] is not None and found[name] is not None and known[name] != found[name]:
            problem = f"has {found[name]} {word}, {source} was learned for {known[name]}"
            raise UserError("denoiser", problem, remedy)
    if weights and known["weights"] is not None and found["weights"] != known["weights"]:
        raise UserError("denoiser", f"its weights are not those that {source} was learned with", remedy)


# ---- reading


@dataclass
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
    """

    folder: Path
    kind: Kind
    config: dict[str, Any]
    info: dict[str, Any]
    denoiser: Any = None
    policy: Any = None
    model: Any = None
    guide: Any = None
    builder: Builder = field(default_factory=Builder, repr=False)

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
        raise UserError("run", f"{folder} holds no {INFO}", "give a folder that fit-order, fit(..., out=...) or share made")
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
    with _default_dtype(dtype):
        _make(run, denoiser)
    parts = {name: getattr(run, name) for name in PARTS if name in config}
    wanted = learned_state(parts, bool(config.get("fit", {}).get("train_denoiser", False)))
    saved = read_tensors(folder / WEIGHTS)
    shapes = [{name: list(tensor.shape) for name, tensor in state.items()} for state in (saved, wanted)]
    check_shapes(shapes[0], shapes[1], folder / WEIGHTS)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])
    for thing in (run.model, run.guide, run.policy, run.denoiser):
        if isinstance(thing, nn.Module):
            thing.to(device).eval()
    if isinstance(run.denoiser, nn.Module):
        run.denoiser.requires_grad_(False)
    return run


def _make(run: Run, denoiser: Any) -> None:
    """Make the objects of a run, without their weights."""
    config, builder = run.config, run.builder
    spec = config["model"]["init_args"].get("denoiser") if run.kind == "order" else config.get("denoiser")
    if denoiser is not None:
        check_denoiser(run.info["denoiser"], denoiser, run.folder, weights=False)
        builder.put(spec, denoiser)
    elif run.kind == "policy" and (run.folder / DENOISER / INFO).is_file():
        denoiser = load_run(run.folder / DENOISER, trust=builder.trust).denoiser
        builder.put(spec, denoiser)
    if run.kind == "order":
        run.model, run.guide = builder.make(config["model"], "model"), builder.make(config["guide"], "guide")
        run.denoiser, run.policy = getattr(run.model, "denoiser", None), policy_of(run.model, run.guide, config)
    else:
        run.denoiser = builder.make(spec, "denoiser")
        run.policy = builder.make(config.get("policy"), "policy")
    if denoiser is None and run.kind != "denoiser":
        check_denoiser(run.info["denoiser"], run.denoiser, run.folder)


def policy_of(model: Any, guide: Any, config: Mapping[str, Any] | None = None) -> Any:
    """What decodes after a fit: the model's policy if it was learned, else a guide's that is blind to hidden tokens.

    Args:
        model: with a `policy`.
        guide: a `PolicyGuide` has one, too.
        config: their descriptions, if they are known.
    """
    own, other = getattr(model, "policy", None), getattr(guide, "policy", None)
    if other is None or other is own or any(True for _ in own.parameters()):
        return own
    described = describe(other) if config is None else config["guide"]
    return own if _holds(described, "sees_truth") else other


def _holds(spec: Any, name: str) -> bool:
    """Whether an argument of this name is true anywhere in a description."""
    if isinstance(spec, dict):
        return any((key == name and bool(item)) or _holds(item, name) for key, item in spec.items())
    return isinstance(spec, list) and any(_holds(item, name) for item in spec)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] != FORMAT:
            raise UserError("run", f"{path} has format {info['format']}, this version reads {FORMAT}", "update orderppl")
        if info["kind"] not in ("order", "denoiser", "policy") or not isinstance(info["digests"], dict):
            raise ValueError("unknown kind")
        if not isinstance(info["denoiser"], dict | None):
            raise ValueError("no denoiser")
        if getattr(torch, info.get("dtype", "float32")) not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
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
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---- sharing


def share_run(
    run: Run, folder: str | Path, *, policy: Any = None, mode: bool = True, results: Mapping[str, Any] | None = None
) -> Path:
    """Make what decodes of a run a folder to publish: the policy alone, its config and a card; no data, no guide.

    A denoiser that was trained here goes along, in a folder inside; one that others have published is named.

    Args:
        run: a fit.
        folder: a new one.
        policy: the run's own when left out; or a wrapper of it, such as `AtPrice(run.policy, 0.1)`.
        mode: decode by the most probable sets, not by draws.
        results: what it was measured to do, JSON values.

    Raises:
        UserError: the folder exists, or there is no policy to share.
    """
    folder = Path(folder)
    policy = run.policy if policy is None else policy
    if folder.exists():
        raise UserError("out", f"{folder} exists", "give a new folder")
    if policy is None:
        raise UserError("run", f"{run.folder} holds no order", "share a run of fit-order")
    making = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    shutil.rmtree(making, ignore_errors=True)
    try:
        parts = {"policy": policy, "num_steps": run.num_steps, "mode": mode, "denoiser": run.denoiser}
        own = run.denoiser is not None and not _is_published(run)
        if own:
            parts["denoiser"] = None
            trained = {"denoiser": _unloaded(run.denoiser), "fit": None}
        start_run(making, "policy", parts)
        ...
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    os.replace(making, folder)
    return folder
