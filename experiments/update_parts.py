"""Where the time of an update goes, and what it keeps of its denoiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PARTS = ("denoiser", "network", "backward", "optimiser", "rest")
"""Forwards of the denoiser; of the network that learns the order; the rest is sampling, likelihoods, bookkeeping."""


class Clock:
    """Seconds by part. Parts may be nested: the time of an inner one does not count for the outer one.

    Args:
        device: what is waited for at the ends of a part.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        """Book the time since the last turn."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def begin(self, name: str) -> None:
        """Start a part, inside the running one if there is one."""
        self._turn()
        self._running.append(name)

    def end(self) -> None:
        """End the running part."""
        self._turn()
        self._running.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of an update."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def inside(self, module: nn.Module, name: str) -> Iterator[None]:
        """Make the calls of a module, or of the modules right inside one that is not called itself, a part."""
        running: list[nn.Module] = []

        def enter(called: nn.Module, inputs: object) -> None:
            running.append(called)
            if len(running) == 1:
                self.begin(name)

        def leave(called: nn.Module, inputs: object, output: object) -> None:
            running.pop()
            if not running:
                self.end()

        hooked = [module, *module.children()]
        handles = [m.register_forward_pre_hook(enter) for m in hooked]
        handles += [m.register_forward_hook(leave, always_call=True) for m in hooked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def recorded_calls(denoiser: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """State and attention mask of every call of a denoiser."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    try:
        yield calls
    finally:
        handle.remove()


def saved_bytes(denoiser: nn.Module, loss: Callable[[], Tensor]) -> int:
    """What autograd keeps of the denoiser's forwards in one loss, parameters left out: its activations."""
    own = {parameter.untyped_storage().data_ptr() for parameter in denoiser.parameters()}
    kept: dict[int, int] = {}
    inside = [False]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(module: nn.Module, inputs: object) -> None:
        inside[0] = True

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        inside[0] = False

    handles = [denoiser.register_forward_pre_hook(enter), denoiser.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        del value
    finally:
        for handle in handles:
            handle.remove()
    return sum(kept.values())


def gradient_bytes(denoiser: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Gradients that the parameters of the denoiser hold behind a backward pass."""
    loss().backward()
    gradients = [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]
    denoiser.zero_grad(set_to_none=True)
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients)
