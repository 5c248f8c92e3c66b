"""The `orderppl` command: one subcommand per experiment, all with the same options.

An experiment is a module with

- `Config`, a frozen dataclass derived from `RunConfig`; a field with `option="--name"` gets that option, one
  with `option="NAME"` is an argument;
- `run(config: Config, out: Path) -> Iterable[Record]`, which reads top to bottom, writes its files into `out` and
  returns the records of `results.json`; with a parameter `resume: bool` it gets `--resume`;
- optionally `DISTRIBUTED = True`, when `torchrun` may start it: every process calls `run`, the first one writes;
- optionally `CONFIG`, the packaged YAML file it starts from, or `PRESETS`, the files to choose from by `--preset`;
- optionally `default_out(config) -> Path`, the folder of its files without `--out`.

Its docstring is the text of `--help`. Only the module that was asked for is imported.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from orderppl.errors import UserError
from orderppl.experiments.config import dump_config, load_config
from orderppl.experiments.failures import explain, holds_settings_alone, how_to_go_on

EXPERIMENTS = {
    "quickstart": "The main job: an exact chain and a real antibody model, a learned order against heuristics.",
    "chain": "The exact Markov chain, where the log evidence and the best order are known.",
    "tree": "An exact Markov field on a binary tree, like the chain.",
    "posterior": "A guide that sees the tokens, on an exact chain: a random order against the best fixed one.",
    "antibodies": "Learn the order in which the pretrained antibody model should write a sequence.",
    "reactions": "Learn the order in which the pretrained reaction model should write a product.",
    "train-denoiser": "Train a small masked-diffusion transformer on a task.",
    "fit-order": "Fit a guide and a reveal prior to a denoiser; can be interrupted and resumed.",
    "evaluate": "Compare the policy of a fitted run with the heuristics on held-out data.",
    "share": "Make a learned order a folder to share: weights, configuration and a card.",
    "generate": "Generate with a shared order, and watch the text being revealed.",
    "diagnose": "Diagnose a fitted run: can its order be trusted, and what is it like?",
    "benchmark estimators": "Bias, variance and cost of every gradient estimator, against exact gradients.",
    "frontier": "Learned orders against every heuristic at equal numbers of denoiser forwards.",
    "report": "One HTML file of a run: tables, figures, and a replay of decoding under two policies.",
    "gsm8k": "Grade-school arithmetic: train a denoiser, learn an order, answer the test problems.",
    "sudoku": "Sudoku 4x4: which cells to fill first; solve rate of learned orders against all heuristics.",
    "ablate": "The paper's regime in miniature, and what each of its ingredients is worth.",
    "benchmark speed": "Time and memory of an SVI update, beside the same update written by hand in plain torch.",
    "benchmark decode": "What decoding costs beside the denoiser forwards it needs, and beside a plain loop.",
}
"""Name on the command line -> one line of help. The module has the same name, with underscores; `benchmark speed`, two
words, is the command `speed` of the group `benchmark`."""
GROUPS = {"benchmark": "Measure what the library promises: estimators, speed and decoding."}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (`sys.argv` when no arguments are given)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    words = [word for word in arguments if not word.startswith("-")]
    asked_for = next((name for name in EXPERIMENTS if words[: len(name.split())] == name.split()), None)
    build_app(asked_for)(args=arguments, prog_name="orderppl")


def build_app(asked_for: str | None = None) -> typer.Typer:
    """The typer application; only the experiment `asked_for` is imported, the others are listed."""
    app = _group("Learn the generation order of masked language models.")
    groups = {group: _group(summary) for group, summary in GROUPS.items()}
    for name, summary in EXPERIMENTS.items():
        *words, command = name.split()
        parent = groups[words[0]] if words else app
        if name == asked_for:
            module = import_module(f"orderppl.experiments.{re.sub('[ -]', '_', name)}")
            text = re.sub(r"^ {4}", "$ ", inspect.getdoc(module) or summary, flags=re.MULTILINE)  # typer drops indents
            parent.command(command, help=text, short_help=summary)(_command(name, module))
        else:
            parent.command(command, help=summary)(lambda: None)
    for group, commands in groups.items():
        app.add_typer(commands, name=group)
    return app


def _group(summary: str) -> typer.Typer:
    group = typer.Typer(help=summary, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
    group.callback()(lambda: None)  # keeps a group with a single command a group
    return group


def _command(name: str, module: types.ModuleType) -> Callable[..., None]:
    """The function behind a subcommand; its signature is made from the experiment's config, for typer to read."""
    own = {item.name: item for item in fields(module.Config)}
    options = {key: item.metadata["option"] for key, item in own.items() if item.metadata.get("option")}
    options |= {key: f"--{key}" for key in ("seed", "device", "dtype") if key in own}
    presets: dict[str, str] = getattr(module, "PRESETS", {})
    resumes = "resume" in inspect.signature(module.run).parameters

    def command(out: Path | None, config: str | None, assign: list[str] | None, debug: bool, **given: Any) -> None:
        resume = bool(given.pop("resume", False))
        preset = given.pop("preset", None)
        try:
            if preset is not None and config is not None:
                raise UserError("--preset", "given together with --config", "give one of them")
            if preset is not None and preset not in presets:
                raise UserError("--preset", f"no such preset: {preset!r}", f"known: {', '.join(presets)}")
            source = presets[preset] if preset is not None else config or getattr(module, "CONFIG", None)
            values = {key: value for key, value in given.items() if value is not None and value != []}
            settings = load_config(module.Config, source, assign or (), values)
            run_experiment(name, module, settings, out or module.default_out(settings), resume=resume)
        except KeyboardInterrupt:
            if _is_first_process():
                typer.echo(f"interrupted; {how_to_go_on(resumes)}", err=True)
            raise typer.Exit(130) from None
        except UserError as error:
            if debug:
                raise
            if _is_first_process() or hasattr(error, "__notes__"):  # a note: of one process only, say so
                typer.echo("; ".join([f"error: {error}", *getattr(error, "__notes__", ())]), err=True)
            raise typer.Exit(2) from None

    default_out = None if hasattr(module, "default_out") else Path("runs") / name.replace(" ", "-")
    signature: dict[str, tuple[Any, Any]] = {
        "out": (Annotated[Path | None, typer.Option("--out", help="folder of the run's files")], default_out),
        "config": (Annotated[str | None, typer.Option("--config", help="packaged config or YAML file")], None),
        "assign": (Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="change a setting")], None),
    }
    if presets:
        text = f"one of: {', '.join(presets)}"
        signature["preset"] = (Annotated[str | None, typer.Option("--preset", help=text)], None)
    hints = typing.get_type_hints(module.Config)
    for key, option in options.items():
        told = own[key].metadata.get("help")
        kind: Any = typer.Option(option, help=told) if option[0] == "-" else typer.Argument(metavar=option, help=told)
        signature[key] = (Annotated[_option_type(hints[key]), kind], None)
    if resumes:
        signature["resume"] = (Annotated[bool, typer.Option("--resume", help="go on with the run in --out")], False)
    signature["debug"] = (Annotated[bool, typer.Option("--debug", help="show the traceback of bad input")], False)
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for key, (hint, default) in signature.items()
        ]
    )
    command.__annotations__ = {key: hint for key, (hint, _) in signature.items()}
    return command


def _option_type(hint: Any) -> Any:
    """What typer should read for a field: its type, or None when the option is not given."""
    options = [item for item in typing.get_args(hint) if item is not type(None)]
    if typing.get_origin(hint) is tuple:
        return list[options[0]] | None  # type: ignore[valid-type]
    if typing.get_origin(hint) is typing.Literal:
        return str | None
    return (options[0] if options else hint) | None


def _is_first_process() -> bool:
    """Whether this process speaks for all of a `torchrun` or `accelerate launch`; known without importing torch."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


def run_experiment(name: str, module: types.ModuleType, config: Any, out: Path, resume: bool = False) -> Path:
    """Run an experiment in its folder: config.yaml first, results.json last.

    A folder that a failure leaves with nothing but settings is removed again. Launched by `torchrun` or `accelerate
    launch`, all processes run the module, which must have `DISTRIBUTED = True`; the first one writes and talks.

    Args:
        name: the experiment, as on the command line.
        module: see the module docstring.
        config: a `module.Config`.
        out: the run folder, made here.
        resume: go on with the interrupted run in `out`, whose config must be the same.

    Returns:
        The path of results.json.
    """
    import pyro
    import torch
    from rich.console import Console

    from orderppl.experiments.results import write_results
    from orderppl.inference.checkpoints import write_text
    from orderppl.inference.processes import Processes

    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError("device", f"cannot use {config.device!r}", "choose cpu or a device of this machine") from error
    processes = Processes.join(config.device)
    if processes.size > 1 and not getattr(module, "DISTRIBUTED", False):
        raise UserError(name, f"runs in one process, not in {processes.size}", "start it without a launcher")
    saved = out / "config.yaml"
    document = dump_config(config)
    if out.exists() and not out.is_dir():
        raise UserError("--out", f"{out} is a file", "give a folder")
    if (out / "config.yaml").is_file() and hasattr(config, "run") and out.resolve() == Path(config.run).resolve():
        raise UserError("--out", f"{out} is the run itself", "choose another folder")
    if resume:
        if not saved.is_file():
            raise UserError("--resume", f"{out} holds no run", "leave --resume out to start one")
        _same_config(load_config(type(config), saved), config)
    is_new = not out.exists() and processes.is_first
    pyro.set_rng_seed(config.seed)
    pyro.clear_param_store()
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if config.dtype == "float64" else torch.float32)
    begin = time.perf_counter()
    try:
        if processes.is_first:
            out.mkdir(parents=True, exist_ok=True)
            (out / "results.json").unlink(missing_ok=True)
            write_text(saved, document)
        with pyro.validation_enabled(False):  # a third of a small update; the tests keep it on
            records = module.run(config, out, resume=True) if resume else module.run(config, out)
        if not processes.is_first:
            return out / "results.json"
        results = write_results(out, name, config, records, time.perf_counter() - begin)
    except BaseException as error:
        if is_new and out.is_dir() and holds_settings_alone(out):
            shutil.rmtree(out)
        known = explain(error, out, config.device, resumes="resume" in inspect.signature(module.run).parameters)
        if known is None:
            raise
        raise known from error
    finally:
        torch.set_default_dtype(default_dtype)
    made = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    written = [str(out / path) for path in made if "checkpoints" not in path.parts]
    Console(soft_wrap=True).print("\nFiles written:", *written, sep="\n  ", highlight=False)
    return results


def _same_config(saved: Any, given: Any, path: str = "") -> None:
    """Refuse to resume under other settings, and name the first one that differs."""
    for item in fields(saved):
        before, now = getattr(saved, item.name), getattr(given, item.name)
        here = f"{path}{item.name}"
        if before == now or not item.metadata.get("alters", True):
            continue
        if hasattr(before, "__dataclass_fields__") and type(before) is type(now):
            _same_config(before, now, f"{here}.")
        raise UserError(here, f"is {now!r}, the interrupted run has {before!r}", "resume with the same settings")


if __name__ == "__main__":
    main()
