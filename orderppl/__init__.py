"""Learn in which order, and how many at a time, a masked diffusion model should reveal its tokens.

The names below are loaded when first used, so that importing the package costs nothing. Programs are in
`orderppl.models` and `orderppl.guides`, which build on this core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orderppl.decoding.decode import decode, follow
    from orderppl.decoding.generate import generate
    from orderppl.errors import UserError
    from orderppl.evaluation.engine import evaluate
    from orderppl.inference import RevealTraceGraph_ELBO
    from orderppl.inference.fitting import fit
    from orderppl.policies import Policy
    from orderppl.runs import load_order, load_run
    from orderppl.unmasking import Batch, Denoiser, State

__version__ = "0.2.0"

_HOME = {
    "Batch": "orderppl.unmasking",
    "Denoiser": "orderppl.unmasking",
    "Policy": "orderppl.policies",
    "RevealTraceGraph_ELBO": "orderppl.inference",
    "State": "orderppl.unmasking",
    "UserError": "orderppl.errors",
    "decode": "orderppl.decoding.decode",
    "evaluate": "orderppl.evaluation.engine",
    "fit": "orderppl.inference.fitting",
    "follow": "orderppl.decoding.decode",
    "generate": "orderppl.decoding.generate",
    "load_order": "orderppl.runs",
    "load_run": "orderppl.runs",
}

__all__ = [
    "Batch",
    "Denoiser",
    "Policy",
    "RevealTraceGraph_ELBO",
    "State",
    "UserError",
    "decode",
    "evaluate",
    "fit",
    "follow",
    "generate",
    "load_order",
    "load_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orderppl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
