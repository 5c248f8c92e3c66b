"""Learn in which order, and how many at a time, a masked diffusion model should reveal its tokens.

The names below are loaded when first used, so that importing the package costs nothing. Programs are in
`orderppl.models` and `orderppl.guides`, which build on this core.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orderppl.decoding import decode, follow, generate, make_policy
    from orderppl.denoising import Canvas, Denoiser
    from orderppl.errors import UserError
    from orderppl.inference import RevealTraceGraph_ELBO, fit

__version__ = "0.1.0"

_HOME = {
    "Canvas": "orderppl.denoising",
    "Denoiser": "orderppl.denoising",
    "RevealTraceGraph_ELBO": "orderppl.inference",
    "UserError": "orderppl.errors",
    "decode": "orderppl.decoding",
    "fit": "orderppl.inference",
    "follow": "orderppl.decoding",
    "generate": "orderppl.decoding",
    "make_policy": "orderppl.decoding",
}

__all__ = [
    "Canvas",
    "Denoiser",
    "RevealTraceGraph_ELBO",
    "UserError",
    "decode",
    "fit",
    "follow",
    "generate",
    "make_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orderppl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
