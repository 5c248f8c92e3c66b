"""What a partially revealed sequence is: canvas, state, trajectory, and the denoiser that reads them."""

from orderppl.unmasking.batch import Batch
from orderppl.unmasking.denoiser import (
    Denoiser,
    PromptDenoiser,
    Reader,
    SplitDenoiser,
    TailDenoiser,
    distinct_rows,
)
from orderppl.unmasking.state import State
from orderppl.unmasking.trajectory import VISIBLE, Trajectory, steps_used

__all__ = [
    "VISIBLE",
    "Batch",
    "Denoiser",
    "PromptDenoiser",
    "Reader",
    "SplitDenoiser",
    "State",
    "TailDenoiser",
    "Trajectory",
    "distinct_rows",
    "steps_used",
]
