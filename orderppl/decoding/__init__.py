"""Decoding: the one loop that reveals, and the faces that other libraries gave it."""

from orderppl.decoding.alternatives import Alternatives, alternatives_at_reveal
from orderppl.decoding.decode import DecodeOutput, PathOutput, decode, follow
from orderppl.decoding.generate import GenerateOutput, generate, with_response
from orderppl.decoding.scheduler import RevealScheduler, SchedulerOutput

__all__ = [
    "Alternatives",
    "DecodeOutput",
    "GenerateOutput",
    "PathOutput",
    "RevealScheduler",
    "SchedulerOutput",
    "alternatives_at_reveal",
    "decode",
    "follow",
    "generate",
    "with_response",
]
