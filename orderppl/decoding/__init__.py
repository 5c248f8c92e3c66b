"""Decoding: the one loop that reveals (`orderppl.decode`, `follow`, `generate`); a scheduler like that of diffusers."""

from orderppl.decoding.scheduler import RevealScheduler

__all__ = ["RevealScheduler"]
