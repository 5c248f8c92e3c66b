"""Train a small masked-diffusion transformer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orderppl.cli.assemble import Known, check_device, fit_settings, make_data, make_denoiser
from orderppl.config import Builder
from orderppl.data import DataSet
from orderppl.models.denoisers.training import DenoiserSettings
from orderppl.unmasking import Denoiser

TRANSFORMER = {"class_path": "orderppl.models.denoisers.TransformerDenoiser"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a small masked-diffusion transformer on a data set, or go on with a trained denoiser.

        orderppl train-denoiser --data Arithmetic --out runs/arithmetic-denoiser
        orderppl train-denoiser --data JsonLines --data.train rows.jsonl --denoiser.width 256 --out runs/mine
        orderppl train-denoiser --config arithmetic_denoiser --resume          # after an interruption
        orderppl train-denoiser --data Arithmetic --denoiser load_denoiser --denoiser.name_or_path runs/mine

    `--denoiser load_denoiser --denoiser.name_or_path RUN` of the other commands reads the run folder.

    Args:
        data: the data set.
        denoiser: architecture, or a trained denoiser to go on from: a run folder or any pretrained masked model.
        vocabulary: all tokens of a pretrained masked model, or those that training rows use: faster, see OUT/start.
        fit: the training.
        seed: of everything random.
        device: where to train, such as cpu or cuda:0.
        dtype: of the network; for bfloat16 by autocast see --fit.bfloat16.
        out: the run folder.
        resume: go on with the run in --out.
    """

    data: DataSet
    denoiser: Denoiser = field(default_factory=lambda: dict(TRANSFORMER))  # type: ignore[assignment]
    vocabulary: Literal["whole", "used"] = "whole"
    fit: DenoiserSettings = field(default_factory=DenoiserSettings)
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    out: str = "runs/train-denoiser"
    resume: bool = False


def run(config: Config) -> None:
    """Train, save, and measure the bound on the test split, or on that of validation where there is none."""
    import torch

    from orderppl.cli.tables import show, write_table
    from orderppl.models.denoisers import train_denoiser
    from orderppl.models.denoisers.training import masked_diffusion_nelbo
    from orderppl.runs import default_dtype

    check_device(config.device)
    with default_dtype(getattr(torch, config.dtype)):
        torch.manual_seed(config.seed)
        builder = Builder(Known())
        data = make_data(builder, config.data)
        denoiser = make_denoiser(builder, config.denoiser, data)
        if config.vocabulary == "used":
            denoiser = _cut(denoiser, data, builder, Path(config.out) / "start")
        settings = fit_settings(builder, DenoiserSettings, config)
        train_denoiser(denoiser, data, out=Path(config.out), resume=config.resume, **settings)
        if os.environ.get("RANK", "0") != "0":
            return
        splits = data.splits()
        split = next((name for name in ("test", "validation") if name in splits), None)
        if split is None:  # nothing is held out
            return
        found = masked_diffusion_nelbo(denoiser, splits[split], settings["batch_size"], draws=8)
    rows = [{"metric": name, "value": value, "split": split, "n": len(splits[split])} for name, value in found.items()]
    write_table(Path(config.out) / "results", split, rows)
    show(rows, title=f"masked-diffusion bound of {config.out}")


def _cut(denoiser: Denoiser, data: DataSet, builder: Builder, folder: Path) -> Denoiser:
    """The denoiser with the tokens of training rows alone, from the folder where it is kept."""
    from orderppl.models.denoisers.vocabulary import cut_vocabulary

    batch = data.splits()["train"].batch
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        cut_vocabulary(denoiser, batch.tokens[batch.attention_mask].unique().tolist(), folder)
    spec = {"class_path": "orderppl.models.denoisers.load_denoiser", "init_args": {"name_or_path": str(folder)}}
    return make_denoiser(builder, spec, data)
