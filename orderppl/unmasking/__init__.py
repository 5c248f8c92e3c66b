"""What a partially revealed sequence is: canvas, state, trajectory, and the denoiser that reads them."""

from orderppl.unmasking.batch import Batch
from orderppl.unmasking.denoiser import Denoiser
from orderppl.unmasking.state import State

__all__ = [
    "Batch",
    "Denoiser",
    "State",
]
