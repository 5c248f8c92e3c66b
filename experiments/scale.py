"""What learning an order for a denoiser of 8 billion parameters needs, on paper: run on shapes, nothing is computed.

    python experiments/scale.py

The denoiser has the shape of LLaDA 8B and bfloat16 weights, and stays frozen. A policy that reads what is visible is
learned with the canvas all hidden. One sequence after another goes through an update (`fit.accumulate`).
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli

from orderppl import Batch, RevealTraceGraph_ELBO
from orderppl.files import write_text
from orderppl.guides import PolicyGuide
from orderppl.inference.cost import GIB, TERA, find_costs
from orderppl.inference.fitting import FitSettings, PairLoss
from orderppl.models import LearnedPolicy, PolicyNetwork, UnmaskingModel
from orderppl.models.denoisers.smdm import SmdmDenoiser

from readme_tables import table

LLADA = {"n_layer": 32, "n_head": 32, "n_embd": 4096, "intermediate_size": 12_288, "vocab_size": 126_464}
HEAD = ["scored steps", "GPUs", "GiB on each", "TFLOP of an update", "seconds of an update", "hours", "dollars"]


def make_loss(num_steps: int, orders: int, scored: int) -> PairLoss:
    """The loss of a fit, on shapes."""
    with torch.device("meta"):
        denoiser = SmdmDenoiser(**LLADA).to(torch.bfloat16).requires_grad_(False).eval()
        policy = LearnedPolicy(PolicyNetwork(denoiser.vocab_size + 1, width=256, layers=2, features=()))
        model, guide = UnmaskingModel(denoiser, policy, num_steps), PolicyGuide(policy, denoiser, num_steps)
        return PairLoss(model, guide, RevealTraceGraph_ELBO(orders, scored_steps=scored))


def main(
    scored: list[int] = [64, 8, 1],  # noqa: B006  (jsonargparse shows it)
    gpus: list[int] = [1, 8],  # noqa: B006
    num_steps: int = 64,
    canvas: int = 256,
    batch_size: int = 16,
    orders: int = 4,
    updates: int = 1000,
    tflops: float = 400.0,
    price: float = 2.5,
    out: Path | None = None,
) -> None:
    """Make the table.

    Args:
        scored: steps of every order that the denoiser scores in an update.
        gpus: processes that share a batch.
        num_steps: step budget T.
        canvas: positions, all hidden.
        batch_size: sequences of an update.
        orders: drawn per sequence, K.
        updates: of the fit.
        tflops: 10^12 operations a second of a GPU.
        price: dollars an hour of a GPU.
        out: file for it; printed when left out.
    """
    rows, lines = Batch(torch.zeros(batch_size, canvas, dtype=torch.long)), []
    for steps in scored:
        loss = make_loss(num_steps, orders, steps)
        for processes in gpus:
            pieces = -(-batch_size // processes)
            settings = FitSettings(updates=updates, batch_size=batch_size, accumulate=pieces, bfloat16=True)
            cost = find_costs(loss, rows, settings, tflops, processes)
            cells = [f"{steps} of {num_steps}", processes, f"{cost['memory'] / GIB:.0f}"]
            cells += [f"{cost['flops'] / TERA:,.0f}", f"{3600 * cost['hours'] / updates:,.2g}", f"{cost['hours']:,.2g}"]
            lines.append([*map(str, cells), f"{cost['hours'] * processes * price:,.2g}"])
    if out is None:
        print(table(HEAD, lines))
    else:
        write_text(out, table(HEAD, lines) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
