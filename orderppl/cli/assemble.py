"""From the descriptions in a command's config to objects, each filled in with what the run knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from orderppl.config import Builder
from orderppl.errors import UserError
from orderppl.import_paths import import_path

Spec = Any
"""A class path with arguments, as `orderppl.config.describe` writes it."""


class Known(dict[str, Any]):
    """What a run knows, by the names of arguments; functions are called when somebody asks."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value() if isinstance(value, Asked) else value


class Asked:
    """A value that takes time to work out."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __call__(self) -> Any:
        """Work it out."""
        return self.function()


def make_data(builder: Builder, spec: Spec | None) -> Any:
    """Make the data set, whose splits are read later, when the tokeniser is known.

    Raises:
        UserError: there is none.
    """
    if spec is None:
        raise UserError("data", "there are none", "give --data, such as Chains or my_module.MyData, or a --config")
    data = builder.make(spec, "data")
    if not hasattr(data, "splits"):
        raise UserError("data", f"{type(data).__name__} has no splits", "derive it from orderppl.data.DataSet")
    builder.known["data"] = data
    builder.known |= {name: getattr(data, name) for name in ("num_states", "stay") if hasattr(data, name)}
    for name in ("vocab_size", "mask_index", "length"):
        builder.known[name] = Asked(lambda name=name: getattr(data, name))  # type: ignore[misc]
    builder.known["num_tokens"] = builder.known["vocab_size"]
    return data


def make_denoiser(builder: Builder, spec: Spec | None, data: Any) -> Any:
    """Make the denoiser, and read the data with its tokeniser, or give it that of the data.

    Raises:
        UserError: there is none, or it knows other tokens than the data.
    """
    if spec is None:
        remedy = "give --denoiser, such as load_denoiser --denoiser.name_or_path FOLDER, or a --config"
        raise UserError("denoiser", "there is none", remedy)
    about = {
        "tokenizer": Asked(lambda: next(iter(data.splits().values())).tokenizer),
        "max_length": Asked(lambda: max(data.length, 256)),  # room for prompts longer than those of the data
        "prompt_room": Asked(lambda: max(data.prompt_length, 1)),
        "separator_index": Asked(lambda: data.separator_index),
    }
    before = builder.known
    builder.known = Known(before | about)
    try:
        denoiser = builder.make(spec, "denoiser")
    finally:
        builder.known = before
    for name in ("vocab_size", "mask_index"):
        if not isinstance(getattr(denoiser, name, None), int):
            problem = f"{type(denoiser).__name__} has no {name}"
            raise UserError("denoiser", problem, "see orderppl.Denoiser for what it needs")
    if data is None:
        return denoiser
    data.splits(getattr(denoiser, "tokenizer", None))
    reads = max(denoiser.vocab_size, denoiser.mask_index + 1), denoiser.mask_index
    if reads != (data.vocab_size, data.mask_index):
        problem = f"knows {reads[0]} tokens and MASK {reads[1]}, the data {data.vocab_size} and {data.mask_index}"
        raise UserError("denoiser", problem, "use data and denoiser of one tokeniser")
    longest = getattr(denoiser, "max_length", None)
    if longest is not None and data.length > longest:
        problem = f"reads {longest} tokens, the longest row of the data has {data.length}"
        raise UserError("data", problem, "leave long rows out by max_length, or use a denoiser that reads more")
    builder.known |= {"denoiser": denoiser, "tokenizer": about["tokenizer"]}
    return denoiser


def fit_settings(builder: Builder, kind: type, config: Any) -> dict[str, Any]:
    """The settings of a fit, checked, as arguments; the command's seed and device unless the fit has its own."""
    values = dict(config.fit)
    for name in ("seed", "device"):
        values[name] = getattr(config, name) if values[name] is None else values[name]
    if values.get("anneal") is not None:  # plain numbers, or as a run folder describes them
        plain = {name: change.get("init_args", change) for name, change in values["anneal"].items()}
        path = "orderppl.inference.Anneal"
        values["anneal"] = {name: {"class_path": path, "init_args": numbers} for name, numbers in plain.items()}
    settings = builder.make({"class_path": import_path(kind), "init_args": values}, "fit")
    return {item.name: getattr(settings, item.name) for item in fields(settings)}


def the_one(name: str, given: Any, inside: Any) -> Any:
    """What is given at the top or inside `model`, but not differently in both.

    Raises:
        UserError: it is.
    """
    if given is not None and inside is not None and given != inside:
        raise UserError(name, f"is given, and model.{name} is given, too", f"change model.{name}")
    return inside if given is None else given


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: with the name.
    """
    import torch

    try:
        float(torch.zeros(1, device=device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError("device", f"cannot use {device!r}", "choose cpu or a device of this machine") from error
