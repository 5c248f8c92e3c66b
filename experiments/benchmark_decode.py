"""How much decoding costs beside the denoiser forwards it cannot do without, and beside a plain loop.

    orderppl benchmark decode --out runs/benchmark-decode
    orderppl benchmark decode --device cuda --out runs/benchmark-decode-gpu
    orderppl benchmark decode --preset quick        # seconds; the numbers mean little

Transformers with random weights and prompts; responses of unequal length. In one process these take turns, round by
round:

- `decode`;
- `forwards`: the bare denoiser on the batches that decoding puts before it, all logits;
- `needed forwards`: the same with the output head at as many positions as decoding asks for;
- `reference loop`: a plain loop over steps and rows that keeps finished rows and computes all logits (its sequences are
  compared with those of `decode`);
- `prompt at every step`, for a denoiser whose prompt does not attend to the response: decoding that does not make use
  of that.

`time_ratio` is the median over rounds of decode / `of` by wall clock, with a 95% interval of that median (the range of
all rounds below 6), `cpu_time_ratio` the same of the process's CPU time, which other work on the machine disturbs less.
`row_forward_ratio` is the sequences that pass through the denoiser over the sum of the rows' own NFE: 1 is the least.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from orderppl.decoding import DecodeOutput, Entropy, Policy, Random, Threshold, decode, describe_policy, make_policy
from orderppl.denoising import Canvas, Denoiser
from orderppl.experiments.benchmark_speed import median_interval, timed, torch_threads
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.results import Record, results_table, save_figure
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.randomness import uniform_noise

PRESETS = {"quick": "decode_quick"}
POLICIES = ("random", "top_prob", "entropy", "threshold")
DECODE, FORWARDS, NEEDED, REFERENCE, REREAD = (
    "decode",
    "forwards",
    "needed forwards",
    "reference loop",
    "prompt at every step",
)


@dataclass(frozen=True)
class DenoiserSize:
    """A transformer denoiser."""

    width: int = setting(128, "size of the hidden vectors", at_least=8)
    layers: int = setting(3, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)


def _large() -> DenoiserSize:
    return DenoiserSize(width=320, layers=8, heads=5)


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of benchmark decode."""

    vocab_sizes: tuple[int, ...] = setting((128, 8192, 32000), "token classes V, MASK included", at_least=8)
    small: DenoiserSize = setting(DenoiserSize, "the small denoiser, 0.6M parameters without the vocabulary")
    large: DenoiserSize = setting(_large, "the large denoiser, 10M parameters without the vocabulary")
    batch_size: int = setting(8, "sequences B", at_least=2)
    length: int = setting(32, "most response positions L", at_least=2)
    prompt: int = setting(16, "most prompt tokens", at_least=2)
    long_prompt: int = setting(96, "most prompt tokens where prompts are read once", at_least=2)
    steps: int = setting(8, "step budget T", at_least=2)
    sure: float = setting(0.25, "share of positions the threshold policy is sure of at first", above=0, below=1)
    spread: float = setting(6.0, "standard deviation of the logits, nats", above=0)
    rounds: int = setting(15, "most rounds of a measurement", at_least=1)
    least_rounds: int = setting(5, "fewest rounds of a measurement", at_least=1)
    seconds: float = setting(20.0, "time after which a measurement takes no further rounds", above=0)
    threads: int = setting(1, "threads of torch on a CPU", at_least=1)


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    denoiser: str
    size: DenoiserSize
    vocab_size: int
    policy: str
    prompt: int
    once: bool = False

    @property
    def labels(self) -> dict[str, object]:
        """What identifies the case in a record."""
        names = {"denoiser": self.denoiser, "vocab_size": self.vocab_size, "policy": self.policy}
        return names | {"prompt": self.prompt, "prompt_once": self.once}


def run(config: Config, out: Path) -> Iterable[Record]:
    """Time and row-forwards of all cases."""
    records: list[Record] = []
    with torch_threads(config.threads), torch.no_grad():
        for case in tqdm(plan(config), desc="benchmark", dynamic_ncols=True):
            records += measure(config, case)
    show(records)
    plot(records, out / "decode.png")
    return records


def plan(config: Config) -> list[Case]:
    """Everything that is measured: policies and vocabularies, then prompts that are read once."""
    cases = []
    for name, size in (("0.6M", config.small), ("10M", config.large)):
        for vocab_size in config.vocab_sizes:
            cases += [Case(name, size, vocab_size, policy, config.prompt) for policy in POLICIES]
        cases.append(Case(name, size, min(config.vocab_sizes), "top_prob", config.long_prompt, once=True))
    return cases


# ---------------------------------------------------------------------------------------------------------- the problem


@dataclass
class Batch:
    """Prompts that end with a separator, and response lengths: int64 [B, C], bool [B, C], int64 [B]."""

    context: Tensor
    context_mask: Tensor
    length: Tensor


def make_batch(config: Config, case: Case) -> Batch:
    """Random prompts; prompts and responses between half and all of their room."""
    generator = torch.Generator().manual_seed(config.seed)
    count = config.batch_size
    context = torch.randint(case.vocab_size - 2, (count, case.prompt), generator=generator)
    sizes = torch.randint(-(-case.prompt // 2), case.prompt + 1, (count, 1), generator=generator)
    context.scatter_(1, sizes - 1, separator(case))
    length = torch.randint(-(-config.length // 2), config.length + 1, (count,), generator=generator)
    device = torch.device(config.device)
    return Batch(context.to(device), (torch.arange(case.prompt) < sizes).to(device), length.to(device))


def separator(case: Case) -> int:
    """Id of the token that ends prompts; the last one is MASK."""
    return case.vocab_size - 2


def make_denoiser(config: Config, case: Case) -> TransformerDenoiser:
    """A transformer with random weights, confident at some positions and not at others."""
    size = case.size
    torch.manual_seed(config.seed)
    denoiser = TransformerDenoiser(
        case.vocab_size,
        case.vocab_size - 1,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
        max_length=case.prompt + config.length,
        separator_index=separator(case),
        prompt_room=case.prompt,
        prompt_reads_response=not case.once,
    )
    nn.init.normal_(denoiser.embed.weight, std=config.spread / math.sqrt(size.width))
    denoiser = denoiser.eval().requires_grad_(False)
    for name, parameter in denoiser.backbone.blocks.named_parameters():
        if name.endswith(("out.weight", "mlp.2.weight")):
            parameter.mul_(4)  # so that what a position reads changes what it predicts
    return denoiser.to(config.device)


def build_policy(config: Config, case: Case, batch: Batch, denoiser: Denoiser) -> Policy:
    """The policy of a case; a threshold between the confidences that the denoiser has at first."""
    if case.policy != "threshold":
        return make_policy(case.policy)
    attended = torch.arange(int(batch.length.max()), device=batch.length.device) < batch.length[:, None]
    canvas = Canvas(denoiser, attended, batch.context, batch.context_mask)
    logits = canvas.logits(torch.full_like(attended, denoiser.mask_index, dtype=torch.int64))
    confidence = logits.softmax(-1).amax(-1)[attended].sort().values
    place = min(max(round(len(confidence) * (1 - config.sure)), 1), len(confidence) - 1)
    return make_policy("threshold", tau=confidence[place - 1 : place + 1].mean().item())  # not one of them: no ties


@dataclass
class Counted:
    """A denoiser that remembers what passes through it; offers what the denoiser offers.

    Attributes:
        batches: token ids int64 [N, S] and attention bool [N, S] of every call.
        positions: positions through the output head, by call.
    """

    denoiser: TransformerDenoiser
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mask_index, self.vocab_size = self.denoiser.mask_index, self.denoiser.vocab_size

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position."""
        return self.output_logits(self.hidden_states(state, attention_mask))

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head; counts rows."""
        self.batches.append((state, attention_mask))
        self.positions.append(0)
        return self.denoiser.hidden_states(state, attention_mask)

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head; counts positions."""
        self.positions[-1] += hidden[..., 0].numel()
        return self.denoiser.output_logits(hidden)

    @property
    def rows(self) -> int:
        """Sequences that have passed through the denoiser."""
        return sum(len(state) for state, _ in self.batches)


class Rereading(nn.Module):
    """A denoiser that offers its output head, but does not let prompts be read once."""

    def __init__(self, denoiser: TransformerDenoiser) -> None:
        super().__init__()
        self.denoiser, self.mask_index, self.vocab_size = denoiser, denoiser.mask_index, denoiser.vocab_size

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position."""
        return self.output_logits(self.hidden_states(state, attention_mask))

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head."""
        return self.denoiser.hidden_states(state, attention_mask)

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head."""
        return self.denoiser.output_logits(hidden)


def forwards(denoiser: TransformerDenoiser, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The denoiser calls of a decoding, and nothing else."""
    for state, attention_mask in batches:
        denoiser(state, attention_mask)


def needed_forwards(
    denoiser: TransformerDenoiser, batches: Sequence[tuple[Tensor, Tensor]], positions: Sequence[int]
) -> None:
    """The same with the output head at so many positions of each call."""
    for (state, attention_mask), count in zip(batches, positions, strict=True):
        hidden = denoiser.hidden_states(state, attention_mask)
        denoiser.output_logits(hidden.flatten(0, 1)[:count])


# --------------------------------------------------------------------------------------------------- the reference loop


def reference_loop(denoiser: Denoiser, policy: Policy, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """Decode without any of the library: all rows at every step, all logits, one row after another.

    Returns:
        Sequences int64 [B, L], 0 at padding, and the NFE of each row, int64 [B].
    """
    context, lengths, mask_index = batch.context, batch.length.tolist(), denoiser.mask_index
    start, count = context.shape[1], len(lengths)
    longest = max(lengths)
    attended = torch.arange(longest, device=context.device) < batch.length[:, None]
    attention_mask = torch.cat([batch.context_mask, attended], 1)
    x = torch.cat([context, torch.where(attended, mask_index, 0)], 1)  # [B, C + L]
    nfe = torch.zeros(count, dtype=torch.int64)
    for step in range(config.steps):
        hidden = (x == mask_index)[:, start:]
        if not hidden.any():
            break
        logits = denoiser(x, attention_mask)[:, start:].clone()
        logits[..., mask_index] = -torch.inf
        probs = logits.softmax(-1)
        best = logits.argmax(-1)
        noise = uniform_noise(config.seed, torch.arange(count, device=x.device), step, longest)
        for row in range(count):
            places = hidden[row].nonzero()[:, 0]
            if len(places) == 0:
                continue
            nfe[row] += 1
            done = lengths[row] - len(places)
            due = max(lengths[row] * (step + 1) // min(config.steps, lengths[row]) - done, 1)
            if step == config.steps - 1:
                chosen = places
            else:
                chosen = places[_reference_rule(policy, probs[row, places], noise[row, places], due)]
            x[row, start + chosen] = best[row, chosen]
    return x[:, start:], nfe


def _reference_rule(policy: Policy, probs: Tensor, noise: Tensor, due: int) -> Tensor:
    """Which of n masked positions to reveal, from their token probabilities float [n, V]: int64 indices."""
    confidence = probs.amax(-1)
    if isinstance(policy, Threshold):
        sure = (confidence >= policy.tau).nonzero()[:, 0]
        return sure if len(sure) else confidence.argmax()[None]
    score = confidence
    if isinstance(policy, Random):
        score = noise
    if isinstance(policy, Entropy):
        score = torch.special.entr(probs).sum(-1).neg()
    return score.topk(min(due, len(score))).indices


# --------------------------------------------------------------------------------------------------------- measurements


def measure(config: Config, case: Case) -> list[Record]:
    """All numbers of one case."""
    batch, denoiser = make_batch(config, case), make_denoiser(config, case)
    policy = build_policy(config, case, batch, denoiser)
    decoded = partial(_decode, policy=policy, batch=batch, config=config)
    counts: list[Record] = []
    variants: dict[str, Callable[[], object]]
    if case.once:
        variants = {DECODE: partial(decoded, denoiser), REREAD: partial(decoded, Rereading(denoiser))}
    else:
        counted, plain = Counted(denoiser), Counted(denoiser)
        output = decoded(counted)
        sequences, nfe = reference_loop(plain, policy, batch, config)
        own = int(output.nfe.sum())
        same = (output.sequences == sequences).all(-1) & (output.nfe.cpu() == nfe).to(sequences.device)
        positions = output.sequences.shape[1] + case.prompt
        counts = [
            {"metric": "row_forward_ratio", "value": counted.rows / own, "variant": DECODE},
            {"metric": "row_forward_ratio", "value": plain.rows / own, "variant": REFERENCE},
            {"metric": "head_share", "value": sum(counted.positions) / (positions * counted.rows), "variant": DECODE},
            {"metric": "same_rows", "value": float(same.double().mean()), "variant": REFERENCE},
            {"metric": "nfe", "value": own / len(nfe), "variant": DECODE, "max": int(output.nfe.max())},
        ]
        variants = {
            DECODE: partial(decoded, denoiser),
            FORWARDS: partial(forwards, denoiser, counted.batches),
            NEEDED: partial(needed_forwards, denoiser, counted.batches, counted.positions),
            REFERENCE: partial(reference_loop, denoiser, policy, batch, config),
        }
    records = [*counts, *times(config, variants)]
    labels = case.labels | {"n": config.batch_size, "steps": config.steps, "device": config.device}
    return [{**record, **labels, **describe_policy(policy)} for record in records]


def _decode(denoiser: Denoiser, policy: Policy, batch: Batch, config: Config) -> DecodeOutput:
    generator = torch.Generator().manual_seed(config.seed)
    prompt = batch.context, batch.context_mask
    return decode(denoiser, policy, *prompt, length=batch.length, max_steps=config.steps, generator=generator)


def times(config: Config, variants: dict[str, Callable[[], object]]) -> list[Record]:
    """Seconds of every variant and ratios of decode to the others, from rounds in which they take turns."""
    device = torch.device(config.device)
    for variant in variants.values():
        variant()
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    for index in range(config.rounds):
        for name in variants if index % 2 == 0 else reversed(variants):
            taken = timed(variants[name], device)
            wall[name].append(taken[0])
            cpu[name].append(taken[1])
        if index + 1 >= config.least_rounds and time.perf_counter() - begin > config.seconds:
            break
    records: list[Record] = []
    for metric, seconds in (("time_ratio", wall), ("cpu_time_ratio", cpu)):
        for name in list(variants)[1:]:
            ratios = [ours / theirs for ours, theirs in zip(seconds[DECODE], seconds[name], strict=True)]
            low, high = median_interval(ratios)
            value = statistics.median(ratios)
            records.append({"metric": metric, "value": value, "low": low, "high": high, "of": name})
    for name, seconds_of in wall.items():
        low, high = median_interval(seconds_of)
        value = statistics.median(seconds_of)
        records.append({"metric": "seconds", "value": value, "low": low, "high": high, "variant": name})
    return records


# ------------------------------------------------------------------------------------------------------- table and plot


def show(records: Sequence[Record]) -> None:
    """Print the ratios, then what they are ratios of."""
    console = Console()
    by_case = ("denoiser", "vocab_size", "policy")
    main = [r for r in records if not r["prompt_once"]]
    for metric, title in (("time_ratio", "wall clock"), ("cpu_time_ratio", "CPU time")):
        chosen = [r for r in main if r["metric"] == metric]
        console.print(results_table(chosen, rows=by_case, columns=("of",), title=f"decode / ..., {title}"))
    chosen = [r for r in main if r["metric"] in ("row_forward_ratio", "head_share", "same_rows", "nfe")]
    console.print(results_table(chosen, rows=by_case, columns=("metric", "variant"), title="What is computed"))
    chosen = [r for r in main if r["metric"] == "seconds"]
    console.print(results_table(chosen, rows=by_case, columns=("variant",), title="Seconds, wall clock"))
    chosen = [r for r in records if r["prompt_once"] and "of" in r]
    title = "Prompts read once / prompts read at every step"
    console.print(results_table(chosen, rows=("denoiser", "prompt"), columns=("metric",), title=title))


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the wall-clock ratios of all policies, by denoiser and vocabulary."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = (FORWARDS, NEEDED, REFERENCE)
    figure, panels = plt.subplots(1, len(others), figsize=(12, 3.6), layout="constrained", sharex=True)
    colours = dict(zip(POLICIES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
    cases = list(dict.fromkeys((str(r["denoiser"]), str(r["vocab_size"])) for r in records if not r["prompt_once"]))
    for panel, other in zip(panels, others, strict=True):
        for shift, (policy, colour) in enumerate(colours.items()):
            points = []
            for r in records:
                if r["metric"] == "time_ratio" and r.get("of") == other and r["policy"] == policy:
                    place = cases.index((str(r["denoiser"]), str(r["vocab_size"]))) + 0.15 * (shift - 1.5)
                    value, low, high = (float(str(r[key])) for key in ("value", "low", "high"))
                    points.append((place, value, value - low, high - value))
            xs, ys, below, above = zip(*points, strict=True)
            panel.errorbar(xs, ys, (below, above), color=colour, linestyle="none", marker=".", label=policy)
        panel.axhline(1.0, color="0.6", linewidth=0.8)
        panel.set_xticks(range(len(cases)), [f"{denoiser}\nV={size}" for denoiser, size in cases], fontsize="x-small")
        panel.set(title=f"decode / {other}", ylim=(0, None))
    panels[0].set_ylabel("wall clock")
    panels[2].legend(fontsize="x-small")
    save_figure(figure, path)
