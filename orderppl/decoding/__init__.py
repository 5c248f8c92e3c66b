"""Decoding: the one loop that reveals, and the faces that other libraries gave it."""

from orderppl.decoding.decode import decode, follow
from orderppl.decoding.generate import generate
from orderppl.decoding.scheduler import RevealScheduler

__all__ = [
    "RevealScheduler",
    "decode",
    "follow",
    "generate",
]
