"""Versions and devices, for a bug report.

orderppl env
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """Versions and devices, for a bug report.

    orderppl env
    """


def run(config: Config) -> None:
    """Print one line per fact."""
    import torch

    from orderppl.evaluation.results import environment

    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    for name, value in {**environment(), "gpus": ", ".join(gpus) or "none"}.items():
        print(f"{name:<12} {value}")
