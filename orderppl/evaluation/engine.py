"""The one evaluation engine: arms played on examples, one row of a table per arm, run, seed and example."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from orderppl.config import describe
from orderppl.data.answers import Grade
from orderppl.data.dataset import Examples
from orderppl.decoding.decode import DecodeOutput, decode, follow
from orderppl.errors import UserError
from orderppl.evaluation.arms import MEASURED, Arm
from orderppl.evaluation.table import PER_TOKEN
from orderppl.evaluation.timing import Rounds, median, take_turns
from orderppl.files import write_text
from orderppl.inference.trainer import module_device
from orderppl.unmasking import Batch, Denoiser

Run = Literal["decoding", "teacher_forced"]
PARTS = "parts"  # folder of finished parts
IDENTITY = "identity.json"  # what all of them depend on


def evaluate(
    arms: Sequence[Arm],
    denoiser: Denoiser,
    examples: Examples | Batch,
    *,
    metrics: Sequence[str] = ("path_nats", "nfe"),
    batch_size: int = 64,
    rows: Sequence[int] | Tensor | None = None,
    grade: Grade | None = None,
    out: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Play every arm on the same examples.

    A row does not depend on the batch size, nor on which other examples and arms there are.

    Args:
        arms: see `Arm`.
        denoiser: of all arms that have none of their own.
        examples: data with texts to grade, or a batch of which only the likelihood is asked for.
        metrics: "accuracy" decodes, "path_nats" reveals the true tokens in the arm's order, "marginal_nats" in as many
            as the arm has seeds; "nfe", the forwards, come with all. An oracle reads the true tokens and is not
            decoded.
        batch_size: examples played together; alike ones, for speed.
        rows: int64 [n], numbers of the examples to use; all when left out.
        grade: what is right, instead of that of the examples.
        out: folder that keeps every finished (arm, run, seed): the same call goes on after a kill, and computes only
            what is new. None: nothing is kept.
        shard: (i, n): do the i-th share of n of the work; processes that share `out` are one evaluation.
        device: where to play; that of the denoiser's parameters when left out.
        progress: show a bar.

    Returns:
        Labels of the arm (see `Arm.labels`), then `run` ("decoding" or "teacher_forced"), `seed`, `row`, `tokens` (to
        reveal), `tokens_written` (of these, up to the first end token), `nfe`, `fallback` (steps that revealed one
        position because the set was empty), `nats` of the true tokens (teacher forced; NaN otherwise) and `correct`
        (decoding). `attrs["missing"]` counts the parts that other shards have not finished.

    Raises:
        UserError: no arms, two of one name, an unknown metric, accuracy without references, blocks for which there are
            no steps, numbers that are NaN, or an `out` with results of another denoiser or other examples.
    """
    data = _Data.of(examples, rows, batch_size, grade, "accuracy" in metrics)
    parts = _parts(arms, metrics, data.longest)
    where = torch.device(device or _device_of(denoiser))
    for who, thing in [("denoiser", denoiser), *((f"arm {a.name!r}", p) for a in arms for p in (a.policy, a.denoiser))]:
        if isinstance(thing, nn.Module):
            _refuse_nan(thing.to(where), who)
    index, count = shard
    if not 0 <= index < count:
        raise UserError("shard", f"{index} of {count}", "count from 0: (0, 4) is the first of four")
    kept = _Kept(None if out is None else Path(out) / PARTS, denoiser, data, where)
    keys = [kept.key(part, number) for number, part in enumerate(parts)]
    mine = [(part, key) for part, key in list(zip(parts, keys, strict=True))[index::count] if kept.get(key) is None]
    for part, key in tqdm(mine, desc="arms", dynamic_ncols=True, disable=None if progress else True):
        kept.put(key, part, part.play(denoiser, data, where))
    found = [kept.get(key) for key in keys]
    table = _table([(part, done) for part, done in zip(parts, found, strict=True) if done is not None], data.numbers)
    table.attrs["missing"] = sum(done is None for done in found)
    return table


def decoding_seconds(
    arms: Sequence[Arm],
    denoiser: Denoiser,
    examples: Examples | Batch,
    *,
    rounds: int = 5,
    batch_sizes: Sequence[int] = (1, 32),
    rows: int = 32,
) -> pd.DataFrame:
    """Wall-clock time of decoding a row, with all that the policy and the loop cost beside the denoiser.

    Arms and batch sizes take turns, batch by batch and round by round, on the same first rows; before that each decodes
    them once.

    Args:
        arms: see `Arm`; an arm that draws is played with its first seed. Oracles cannot decode.
        denoiser: of all arms that have none of their own; on the device of the policies.
        examples: as for `evaluate`.
        rounds: measurements of every arm at every batch size.
        batch_sizes: rows that are decoded together; sizes above the number of rows are left out.
        rows: how many examples, from the first.

    Returns:
        One row per batch size B and arm: `metric` "seconds_batch_B", `value`, seconds per row: the median over rounds,
        with a 95% interval of that median `low` to `high`; `arm`, `n` (rows), `rounds`, and `nfe`, the mean forwards of
        these rows.
    """
    count, longest = min(rows, len(examples)), _Data.of(examples, None, 1, None, False).longest
    where, about = _device_of(denoiser), dict[tuple[str, str], dict[str, Any]]()
    played: dict[tuple[int, str, str], Callable[[], DecodeOutput]] = {}
    for size in (size for size in batch_sizes if size <= count):
        data, metric = _Data.of(examples, range(count), size, None, False), f"seconds_batch_{size}"
        canvases = [(data.canvas(places, where), data.numbers[places]) for places in data.places]
        for arm in (arm for arm in arms if arm.kind != "oracle"):
            part = _Part(arm, "decoding", arm.seeds[0], arm.steps or longest)
            plays = [partial(part.output, denoiser, *canvas) for canvas in canvases]
            nfe = sum(int(play().nfe.sum()) for play in plays) / count
            about[metric, arm.name] = {"metric": metric, "arm": arm.name, "n": count, "rounds": rounds, "nfe": nfe}
            played |= {(number, metric, arm.name): play for number, play in enumerate(plays)}
    turns = {turn: played[turn] for turn in sorted(played, key=lambda turn: turn[0])}
    wall = take_turns(turns, Rounds(rounds, rounds), where).wall
    for who, labels in about.items():
        by_batch = [seconds for (_, *turn), seconds in wall.items() if tuple(turn) == who]
        labels |= median([sum(of_round) / count for of_round in zip(*by_batch, strict=True)])
    return pd.DataFrame(about.values())


def _device_of(denoiser: Denoiser) -> torch.device:
    return torch.device(module_device(denoiser) if isinstance(denoiser, nn.Module) else "cpu")


# ----------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class _Data:
    """The examples in batches of alike ones.

    Attributes:
        numbers: int64 [n], the number of every example.
        examples: on the CPU; without references, nothing can be graded.
        places: which of them are in each batch.
        grade: what is right.
    """

    numbers: Tensor
    examples: Examples
    places: list[Tensor]
    grade: Grade

    @classmethod
    def of(
        cls,
        source: Examples | Batch,
        rows: Sequence[int] | Tensor | None,
        batch_size: int,
        grade: Grade | None,
        graded: bool,
    ) -> _Data:
        """Cut examples into batches."""
        whole = source if isinstance(source, Examples) else Examples(Batch.of(source).to("cpu"))
        numbers = torch.arange(len(whole)) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        if not len(numbers) or not 0 <= int(numbers.min()) <= int(numbers.max()) < len(whole):
            raise UserError("rows", f"{len(numbers)} rows of {len(whole)} examples", "give numbers of the examples")
        if batch_size < 1:
            raise UserError("batch_size", f"{batch_size} rows", "give at least 1")
        if graded and whole.references is None:
            raise UserError("metrics", "accuracy of examples without references", "leave it out")
        if graded and whole.references is not None and len(whole.references) != len(whole):
            problem = f"{len(whole.references)} references for {len(whole)} examples"
            raise UserError("examples", problem, "give one reference per example")
        examples = whole.rows(numbers)
        latent, attended = examples.batch.latent.sum(-1), examples.batch.attention_mask.sum(-1)
        if not bool(latent.any()):
            raise UserError("examples", "nothing to reveal", "leave some positions that are not given")
        alike = (latent * (int(attended.max()) + 1) + attended).argsort(stable=True)
        return cls(numbers, examples, list(alike.split(batch_size)), whole.grade if grade is None else grade)

    @property
    def batch(self) -> Batch:
        """All examples."""
        return self.examples.batch

    @property
    def longest(self) -> int:
        """Tokens to reveal in the longest row."""
        return int(self.batch.latent.sum(-1).max())

    def canvas(self, places: Tensor, device: torch.device) -> Batch:
        """Some examples as they are played, on a device."""
        batch = self.batch.rows(places).trimmed()
        told = Batch(batch.tokens, batch.attention_mask, batch.attention_mask & ~batch.latent)
        _ = told.prefix  # while the host has it
        return told.to(device)

    def digest(self) -> str:
        """Digest of what the results of a row depend on."""
        tensors = {"tokens": self.batch.readable, "attended": self.batch.attention_mask, "latent": self.batch.latent}
        return value_digest([tensor_digest(tensors), self.numbers.tolist(), self.examples.end_index])

    def graded(self, tokens: Tensor) -> Tensor:
        """Whether what was written is right: float64 [n] from int64 [n, S]."""
        references = self.examples.references
        assert references is not None
        return self.grade(self.examples.texts(tokens), references)


# -------------------------------------------------------------------------------------------------- parts of the work


@dataclass(frozen=True)
class _Part:
    """A part of the work: one arm, played in one way with one seed."""

    arm: Arm
    run: Run
    seed: int
    steps: int

    @torch.no_grad()
    def play(self, denoiser: Denoiser, data: _Data, device: torch.device) -> dict[str, list[Any]]:
        """Columns of the table, in the order of the examples."""
        columns: dict[str, Tensor] = {}
        tokens = data.batch.tokens.clone()
        for places in data.places:
            output = self.output(denoiser, data.canvas(places, device), data.numbers[places])
            if self.run == "decoding":
                columns_there = data.batch.attention_mask[places].any(0).nonzero().squeeze(-1)
                tokens[places.unsqueeze(-1), columns_there] = output.sequences.cpu()
            for name in ("nfe", "fallback", "nats"):
                values = getattr(output, name)
                columns.setdefault(name, torch.zeros(len(tokens), dtype=values.dtype))[places] = values.cpu()
        latent = data.batch.latent
        columns["tokens"] = latent.sum(-1)
        columns["tokens_written"] = _before_end(tokens, latent, data.examples.end_index)
        if self.run == "decoding":
            columns["correct"] = data.graded(tokens)
            del columns["nats"]
        return {name: values.tolist() for name, values in columns.items()}

    def output(self, denoiser: Denoiser, canvas: Batch, rows: Tensor) -> DecodeOutput:
        """What `decode` or `follow` returns, given the numbers of the rows; what they refuse is said of the arm.

        An arm with a denoiser of its own is played with that one.
        """
        denoiser = denoiser if self.arm.denoiser is None else self.arm.denoiser
        options: dict[str, Any] = {"mode": self.arm.mode, "block_size": self.arm.block_size, "row_ids": rows}
        options["generator"] = torch.Generator().manual_seed(self.seed)
        try:
            if self.run == "teacher_forced":
                return follow(self.arm.policy, denoiser, canvas, self.steps, **options)
            options |= {"max_steps": self.steps, "temperature": self.arm.temperature}
            return decode(denoiser, self.arm.policy, canvas, **options)  # which hides what is not given
        except UserError as error:
            raise UserError(f"arm {self.arm.name!r}: {error.field}", error.problem, error.remedy) from error


def _before_end(tokens: Tensor, latent: Tensor, end: int | None) -> Tensor:
    """Latent positions up to the first end token among them: int64 [n]."""
    if end is None:
        return latent.sum(-1)
    ended = ((tokens == end) & latent).long().cumsum(-1)
    return (latent & ((ended == 0) | ((ended == 1) & (tokens == end)))).sum(-1)


def _parts(arms: Sequence[Arm], metrics: Sequence[str], longest: int) -> list[_Part]:
    """All parts of the work, in the order of the table."""
    unknown = [metric for metric in metrics if metric not in ("accuracy", *PER_TOKEN, "nfe")]
    if unknown or not metrics:
        problem = f"unknown metric {unknown[0]!r}" if unknown else "there is none"
        raise UserError("metrics", problem, "use accuracy, path_nats, marginal_nats or nfe")
    if not arms:
        raise UserError("arms", "there are none", "give at least one")
    names = [arm.name for arm in arms]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError("arms", f"{twice[0]} comes twice", "give every arm a name of its own")
    runs: list[Run] = ["decoding"] if "accuracy" in metrics else []
    runs += ["teacher_forced"] if any(metric in PER_TOKEN for metric in metrics) or not runs else []
    parts = []
    for arm, run in itertools.product(arms, runs):
        if run == "teacher_forced" or arm.kind != "oracle":
            parts += [_Part(arm, run, seed, arm.steps or longest) for seed in arm.seeds]
    for part in parts:
        size = part.arm.block_size
        if size is not None and size > 0 and -(-longest // size) > part.steps:
            problem = f"{part.arm.name}: {-(-longest // size)} blocks of {size} in {part.steps} steps"
            raise UserError("block_size", problem, "use larger blocks or more steps")
    return parts


def _table(done: Sequence[tuple[_Part, Mapping[str, Sequence[Any]]]], rows: Tensor) -> pd.DataFrame:
    """The table of finished parts."""
    labels = pd.DataFrame([{**part.arm.labels(part.steps), "run": part.run, "seed": part.seed} for part, _ in done])
    names = [name for name in MEASURED if name not in ("run", "seed", "row")]
    measured: dict[str, Any] = {"row": np.tile(rows.numpy(), len(done))}
    for name in names:
        measured[name] = [value for _, columns in done for value in columns.get(name, [math.nan] * len(rows))]
    if done:
        labels = labels.astype({"training_seed": "Int64", "block_size": "Int64"})
        labels = labels[[name for name in labels if name not in MEASURED] + ["run", "seed"]]
        labels = labels.loc[np.repeat(np.arange(len(done)), len(rows))].reset_index(drop=True)
    return pd.concat([labels, pd.DataFrame(measured)], axis=1)


# ------------------------------------------------------------------------------------------------------- what is kept


class _Kept:
    """Finished parts: in memory, or each in a file of its own whose name is a digest of all that it depends on.

    Args:
        folder: of the files; None: memory.
        denoiser: of all arms that have none of their own.
        data: the examples.
        device: where they are played.

    Raises:
        UserError: the folder holds parts of another denoiser or of other examples.
    """

    def __init__(self, folder: Path | None, denoiser: Denoiser, data: _Data, device: torch.device) -> None:
        self.folder, self.data, self._memory = folder, data, dict[str, dict[str, list[Any]]]()
        if folder is None:
            return
        cast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None
        identity = {"denoiser": object_digest(denoiser, "denoiser"), "examples": data.digest()}
        identity |= {"device": device.type, "autocast": str(cast)}
        path = folder / IDENTITY
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(identity, indent=1) + "\n")
        before = _read(path, set(identity))
        changed = [name for name in identity if before[name] != identity[name]]
        if changed:
            problem = f"{folder.parent} holds results of other {changed[0].removesuffix('s')}s"
            raise UserError("out", problem, "choose another folder, or delete that one")

    def key(self, part: _Part, number: int) -> str:
        """Digest of what a part depends on besides the identity of all."""
        if self.folder is None:
            return str(number)
        arm, graded, who = part.arm, part.run == "decoding", f"arm {part.arm.name!r}"
        return value_digest(
            {
                "policy": object_digest(arm.policy, who),
                "denoiser": None if arm.denoiser is None else object_digest(arm.denoiser, who),
                "played": [part.run, part.seed, part.steps, arm.mode, arm.block_size, graded and arm.temperature],
                "graded": [_name_of(self.data.grade), self.data.examples.references] if graded else None,
            }
        )

    def get(self, key: str) -> dict[str, list[Any]] | None:
        """Columns of a part, None if it is not finished."""
        path = None if self.folder is None else self.folder / f"{key[:32]}.json"
        if path is None or not path.is_file():
            return self._memory.get(key)
        columns = _read(path, {"columns"})["columns"]
        if not (isinstance(columns, dict) and {len(values) for values in columns.values()} == {len(self.data.numbers)}):
            raise UserError(str(path), f"does not hold columns of {len(self.data.numbers)} rows", "delete it")
        return columns

    def put(self, key: str, part: _Part, columns: dict[str, list[Any]]) -> None:
        """Keep a finished part."""
        if self.folder is None:
            self._memory[key] = columns
        else:
            about = {"arm": part.arm.name, "run": part.run, "seed": part.seed}
            write_text(self.folder / f"{key[:32]}.json", json.dumps({**about, "columns": columns}) + "\n")


def _read(path: Path, names: set[str]) -> dict[str, Any]:
    """A JSON object with these entries."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not names <= set(found):
        raise UserError(str(path), "is not a file of an evaluation", "delete it")
    return found


# ------------------------------------------------------------------------------------------------------------ digests


def value_digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and values, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def object_digest(thing: object, who: str) -> str:
    """Digest of how an object was made, and of its weights; `who` it is in messages.

    Raises:
        UserError: it cannot be described, so that nobody could tell it from another one.
    """
    try:
        made = describe(thing)
    except UserError as error:
        raise UserError(f"{who}, to be kept", f"{error.field} {error.problem}".strip(), error.remedy) from error
    return value_digest([made, tensor_digest(thing.state_dict()) if isinstance(thing, nn.Module) else None])


def _name_of(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _refuse_nan(module: nn.Module, who: str) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise UserError(who, f"NaN in its weights ({name})", "train it again, or load other weights")
