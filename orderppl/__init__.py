"""Learn in which order, and how many at a time, a masked diffusion model should reveal its tokens.

The names below are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orderppl.decoding import decode, follow, make_policy
    from orderppl.denoising import Canvas, Denoiser
    from orderppl.errors import UserError
    from orderppl.guides import MeanFieldGuide, PolicyGuide, RandomGuide, RenormalisedScoreGuide
    from orderppl.inference import RevealTraceGraph_ELBO, fit
    from orderppl.models import SequentialUnmaskingModel, UnmaskingModel

__version__ = "0.1.0"

_HOME = {
    "Canvas": "orderppl.denoising",
    "Denoiser": "orderppl.denoising",
    "MeanFieldGuide": "orderppl.guides",
    "PolicyGuide": "orderppl.guides",
    "RandomGuide": "orderppl.guides",
    "RenormalisedScoreGuide": "orderppl.guides",
    "RevealTraceGraph_ELBO": "orderppl.inference",
    "SequentialUnmaskingModel": "orderppl.models",
    "UnmaskingModel": "orderppl.models",
    "UserError": "orderppl.errors",
    "decode": "orderppl.decoding",
    "fit": "orderppl.inference",
    "follow": "orderppl.decoding",
    "make_policy": "orderppl.decoding",
}

__all__ = [
    "Canvas",
    "Denoiser",
    "MeanFieldGuide",
    "PolicyGuide",
    "RandomGuide",
    "RenormalisedScoreGuide",
    "RevealTraceGraph_ELBO",
    "SequentialUnmaskingModel",
    "UnmaskingModel",
    "UserError",
    "decode",
    "fit",
    "follow",
    "make_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orderppl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
