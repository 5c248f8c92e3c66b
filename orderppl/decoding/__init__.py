"""Decoding: the loop that reveals (`orderppl.decode`, `follow`, `generate`), and the face that diffusers gave it."""

from orderppl.decoding.scheduler import RevealScheduler

__all__ = ["RevealScheduler"]
