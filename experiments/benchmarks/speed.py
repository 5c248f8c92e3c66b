"""Time and memory of an SVI update, beside the same update written by hand in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import handwritten
import pyro
import torch
from timing import Records, Rounds, command, finish, peak_bytes, random_batch, ratio_figure, take_turns, torch_threads
from torch import Tensor, nn
from tqdm import tqdm

from orderppl import Batch
from orderppl.guides import Guide, MeanFieldGuide, PolicyGuide, SequentialGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.fit import PairLoss
from orderppl.models import LearnedPolicy, PolicyNetwork, SequenceEncoder, SequentialUnmaskingModel, UnmaskingModel
from orderppl.models.denoisers import SmdmDenoiser, TransformerDenoiser
from orderppl.policies import RandomSteps

Axis = Literal["steps", "length", "particles", "trainable", "precision", "compiled", "smdm"]
MODES = ("stacked", "sequential", "policy")
LIBRARY, BY_HAND, BARE = "library", "by hand", "bare forwards"


@dataclass(frozen=True)
class Size:
    """A denoiser with random weights, and how much is put before it.

    Args:
        width: size of the hidden vectors.
        layers: blocks.
        heads: attention heads.
        batch_size: sequences B.
        particles: orders per sequence K.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    batch_size: int = 8
    particles: int = 4


@dataclass(frozen=True)
class Shape:
    """What is revealed.

    Args:
        steps: step budget T, where it is not varied.
        length: most positions to reveal.
        prompt: most prompt tokens.
        vocab_size: token classes V, MASK included.
    """

    steps: int = 8
    length: int = 32
    prompt: int = 8
    vocab_size: int = 128


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    axis: Axis
    mode: str
    denoiser: str
    size: Size
    shape: Shape
    trainable: bool = False
    precision: str = "float32"
    compiled: bool = False

    @property
    def labels(self) -> dict[str, object]:
        """What identifies the case in a record."""
        own = {key: value for key, value in vars(self).items() if key not in ("size", "shape")}
        return own | {"batch_size": self.size.batch_size, "particles": self.size.particles} | asdict(self.shape)

    def denoiser_module(self) -> nn.Module:
        """A transformer, or an SMDM; the last id is MASK."""
        size, classes = self.size, self.shape.vocab_size
        if self.axis == "smdm":
            network: nn.Module = SmdmDenoiser(size.layers, size.heads, size.width, 4 * size.width, classes - 1)
        else:
            longest = self.shape.length + self.shape.prompt
            shape = {"width": size.width, "layers": size.layers, "heads": size.heads, "max_length": longest}
            network = TransformerDenoiser(classes, classes - 1, **shape)
        return network.requires_grad_(self.trainable)


def main(
    out: Path | None = None,
    axes: tuple[Axis, ...] = ("steps", "length", "particles", "trainable", "precision", "compiled"),
    steps: tuple[int, ...] = (2, 4, 8, 16, 32),
    lengths: tuple[int, ...] = (16, 32, 64),
    particles: tuple[int, ...] = (2, 4, 8),
    shape: Shape = Shape(),  # noqa: B008
    small: Size = Size(),  # noqa: B008
    large: Size = Size(320, 8, 5, 4, 2),  # noqa: B008
    smdm: Size = Size(512, 10, 8, 2, 2),  # noqa: B008
    smdm_shape: Shape = Shape(3, 24, 8, 8193),  # noqa: B008
    rounds: Rounds = Rounds(),  # noqa: B008
    device: str = "cpu",
) -> None:
    """Time an SVI update of the library beside the same update by hand in plain torch (`handwritten.py`).

    An update is loss, gradient and Adam step on one batch with prompts, by one CPU thread. Library and twin take turns,
    update by update, in one process. `time_ratio` is the median over rounds of library / twin by wall clock, with a 95%
    interval of that median; `cpu_time_ratio` the same of the process's CPU time, which other work on the machine
    disturbs less. `memory_ratio` compares the peak of what one update allocates on top of what was there before.
    `host_seconds` is an update without its denoiser. On the axis smdm there is no twin: an update takes turns with the
    bare forwards it needs. `--axes '[steps]' --steps '[2, 8]'` takes two minutes, the defaults a quarter of an hour.

    Args:
        out: folder for results.json and speed.png.
        axes: what is varied.
        steps: step budgets T of the axis steps.
        lengths: response lengths of the axis length.
        particles: orders per sequence of the axis particles.
        shape: everything that is not varied.
        small: the small denoiser, 0.6M parameters.
        large: the large denoiser, 10M parameters.
        smdm: a random SMDM of 50M parameters.
        smdm_shape: what it is measured on.
        rounds: how long library and twin take turns.
        device: of torch.
    """
    config = {key: value if key == "device" else str(value) for key, value in locals().items() if key != "out"}
    base = Case("steps", "stacked", "0.6M", small, shape)
    sizes = (("0.6M", small), ("10M", large))
    both = [replace(base, mode=mode, denoiser=name, size=size) for name, size in sizes for mode in MODES]
    cases = [replace(case, shape=replace(shape, steps=count)) for case in both for count in steps]
    cases += [replace(base, axis="length", shape=replace(shape, length=length)) for length in lengths]
    cases += [replace(base, axis="particles", size=replace(small, particles=count)) for count in particles]
    cases += [replace(case, axis="trainable", trainable=True) for case in both]
    # Slow on CPUs without such instructions, so with the fewest steps.
    cases.append(replace(base, axis="precision", precision="bfloat16", shape=replace(shape, steps=min(steps))))
    cases.append(replace(base, axis="compiled", compiled=True))
    for trainable in (False, True):
        cases += [Case("smdm", mode, "smdm", smdm, smdm_shape, trainable) for mode in ("stacked", "policy")]
    records: Records = []
    with torch_threads(1), pyro.validation_enabled(False):
        for case in tqdm([case for case in cases if case.axis in axes], dynamic_ncols=True):
            records += [{**record, **case.labels, "device": device} for record in measure(case, rounds, device)]
    by_size = ("axis", "mode", "denoiser", "steps", "length", "particles")
    shared = {"rows": by_size, "columns": ("metric", "variant")}
    ratios = {"metrics": ("time_ratio", "cpu_time_ratio", "memory_ratio"), "rows": by_size, "columns": ("metric", "of")}
    costs = {"metrics": ("seconds", "host_seconds", "peak_megabytes", "denoiser_rows"), **shared}
    finish(out, "speed", config, records, [ratios | {"title": "SVI update / ..."}, costs | {"title": "Costs"}])
    if out is not None:
        ratio_figure(out / "speed.png", records, x="steps", lines=("mode", "denoiser"), axis="steps")


def measure(case: Case, rounds: Rounds, device: str) -> Records:
    """All numbers of one case; a compiler that fails leaves one record with the reason."""
    torch.manual_seed(0)
    shape, place = case.shape, torch.device(device)
    batch = random_batch(case.size.batch_size, shape.prompt, shape.length, shape.vocab_size, seed=0).to(device)
    denoiser = case.denoiser_module().to(device)
    network: Any = torch.compile(denoiser) if case.compiled else denoiser
    updates = make_updates(case, network, batch)
    calls: list[tuple[Tensor, Tensor]] = []
    handle = denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    try:
        updates[LIBRARY]()
    except Exception as error:  # what torch.compile raises depends on its backend
        if not case.compiled:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [{"metric": "compile_available", "value": 0, "reason": reason}]
    finally:
        handle.remove()
    rows = sum(len(state) for state, _ in calls) / case.size.batch_size
    other = BARE if case.axis == "smdm" else BY_HAND
    variants = {LIBRARY: updates[LIBRARY], other: partial(forwards, network, calls) if other == BARE else updates[other]}
    variants[other]()  # the first time is never measured
    timing = take_turns(variants, rounds, place)
    memory = {name: peak_bytes(update, place) for name, update in variants.items()}
    records = [*timing.ratios(LIBRARY, other), *timing.seconds()]
    records.append({"metric": "memory_ratio", "value": memory[LIBRARY] / memory[other], "of": other})
    records.append({"metric": "denoiser_rows", "value": rows, "variant": LIBRARY})
    records += [{"metric": "peak_megabytes", "value": size / 2**20, "variant": name} for name, size in memory.items()]
    if case.axis == "steps":  # the same without what the denoiser takes
        most = case.size.batch_size * case.size.particles * shape.steps
        logits = torch.randn(most, shape.length + shape.prompt, shape.vocab_size, device=device)
        host = make_updates(case, KnownLogits(logits), batch)
        for update in host.values():
            update()
        seconds = take_turns(host, rounds, place).seconds()
        records += [{**record, "metric": f"host_{record['metric']}"} for record in seconds]
    return records


@torch.no_grad()
def forwards(denoiser: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> None:
    """The denoiser calls of an update, and nothing else."""
    for state, attention_mask in calls:
        denoiser(state, attention_mask)


class KnownLogits(nn.Module):
    """Stands in for a denoiser at no cost: the same logits for every state, the last class is MASK."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.vocab_size, self.mask_index = logits, logits.shape[-1], logits.shape[-1] - 1
        self.logits[..., self.mask_index] = -torch.inf  # its callers write the same there

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Return as many rows as there are states."""
        return self.logits[: len(state)]


def make_updates(case: Case, denoiser: Any, batch: Batch) -> dict[str, Callable[[], None]]:
    """The update of the library and the one by hand, of the same networks and by the same optimiser."""
    steps, particles = case.shape.steps, case.size.particles
    learner, model, guide, by_hand = make_pair(case.mode, denoiser, steps, case.shape.vocab_size)
    for module in (learner, model, guide):
        module.to(batch.device)
    parameters = [p for module in (learner, denoiser) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    loss = PairLoss(model, guide, RevealTraceGraph_ELBO(particles))

    def update(value: Callable[[], Tensor]) -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=case.precision == "bfloat16"):
            current = value()
        current.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end: what is held between updates is the same for both

    twin = partial(by_hand, batch, num_steps=steps, num_particles=particles)
    return {LIBRARY: partial(update, partial(loss, batch)), BY_HAND: partial(update, twin)}


def make_pair(
    mode: str, denoiser: Any, steps: int, vocab_size: int
) -> tuple[nn.Module, nn.Module, nn.Module, Callable[..., Tensor]]:
    """What learns the order, the library's model and guide, and the loss by hand."""
    if mode == "policy":
        policy = LearnedPolicy(PolicyNetwork(vocab_size))
        by_hand = partial(handwritten.tied_policy_update, denoiser, policy.logits)
        return policy, UnmaskingModel(denoiser, policy, steps), PolicyGuide(policy, denoiser, steps), by_hand
    network = SequenceEncoder(vocab_size, steps)
    guide: Guide = MeanFieldGuide(network, steps)
    if mode == "stacked":
        by_hand = partial(handwritten.stacked_update, denoiser, network)
        return network, UnmaskingModel(denoiser, RandomSteps(), steps), guide, by_hand
    by_hand = partial(handwritten.sequential_update, denoiser, network)
    return network, SequentialUnmaskingModel(denoiser, RandomSteps(), steps), SequentialGuide(guide), by_hand


if __name__ == "__main__":
    command(main)
