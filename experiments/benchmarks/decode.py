"""What decoding costs beside the denoiser forwards it cannot do without, and beside a plain loop."""
# ruff: noqa: B008  (what defaults call makes frozen dataclasses)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from reference import Counted, Shape, Size, Split, forwards, make_policy, make_problem, needed_forwards, reference_loop
from torch import Tensor
from tqdm import tqdm

from orderppl import decode
from orderppl.decoding.decode import DecodeOutput
from orderppl.evaluation.timing import Rounds, take_turns

from timing import Records, command, finish

POLICIES = ("random", "top_prob", "entropy", "threshold")
DECODE, FORWARDS, NEEDED, REFERENCE = "decode", "forwards", "needed forwards", "reference loop"
REREAD = "prompt at every step"


def main(
    out: Path | None = None,
    vocab_sizes: tuple[int, ...] = (512, 32000),
    small: Size = Size(),
    large: Size = Size(320, 8, 5),
    shape: Shape = Shape(),
    long_prompt: int = 96,
    rounds: Rounds = Rounds(least=5, seconds=20.0),
    device: str = "cpu",
) -> None:
    """Time `decode` beside the forwards it needs and beside a plain loop, on transformers with random weights.

    Rows are decoded together, and one by one (`batch_size` 1, beside the reference loop only). By one CPU thread they
    take turns in one process, round by round: `decode`; `forwards`, the bare denoiser on the batches that decoding puts
    before it, all logits; `needed forwards`, the same with the output head at as many positions as decoding asks for;
    `reference loop`, a loop over steps and rows as public samplers have it, which keeps finished rows and computes all
    logits, and whose sequences are compared with those of `decode`. For a denoiser whose prompt does not attend to the
    response, `prompt at every step` is decoding that does not make use of that.

    `time_ratio` is the median over rounds of decode / `of` by wall clock, with a 95% interval of that median;
    `cpu_time_ratio` the same of the process's CPU time, which other work on the machine disturbs less.
    `row_forward_ratio` is the sequences that pass through the denoiser over the sum of the rows' own NFE, at least 1.

    Args:
        out: folder for results.json.
        vocab_sizes: token classes V, MASK included.
        small: the small denoiser, 0.6M parameters without the vocabulary.
        large: the large denoiser, 10M parameters without the vocabulary.
        shape: what is decoded.
        long_prompt: most prompt tokens where prompts are read once.
        rounds: how long variants take turns.
        device: of torch.
    """
    config = {key: value if key == "device" else str(value) for key, value in locals().items() if key != "out"}
    cases: list[tuple[dict[str, object], Size, Shape]] = []
    for name, size in (("0.6M", small), ("10M", large)):
        labels: dict[str, object] = {"denoiser": name, "prompt_once": False}
        for classes, together, policy in product(vocab_sizes, (shape.batch_size, 1), POLICIES):
            own = {"vocab_size": classes, "batch_size": together, "policy": policy}
            cases.append((labels | own, size, shape))
        once = labels | {"vocab_size": min(vocab_sizes), "batch_size": shape.batch_size, "policy": "top_prob"}
        once["prompt_once"] = True
        cases.append((once, size, replace(shape, prompt=long_prompt)))
    records: Records = []
    with torch.no_grad():
        for labels, size, room in tqdm(cases, dynamic_ncols=True):
            found = measure(labels, size, room, rounds, device)
            records += [{**record, **labels} for record in found]
    rows = ("denoiser", "vocab_size", "batch_size", "policy")
    by_case: dict[str, Any] = {"rows": rows, "columns": ("of",), "prompt_once": False}
    counts = ("row_forward_ratio", "head_share", "same_rows", "nfe")
    computed = by_case | {"columns": ("metric", "variant"), "metrics": counts, "title": "What is computed"}
    tables = [by_case | {"metrics": (f"{m}time_ratio",), "title": f"decode / ..., {m}time"} for m in ("", "cpu_")]
    reread = {"rows": ("denoiser", "prompt_once"), "columns": ("metric", "of"), "prompt_once": True}
    reread |= {"metrics": ("time_ratio", "cpu_time_ratio"), "title": "Prompts read once"}
    finish(out, "decode", config, records, [*tables, computed, reread])


def measure(labels: dict[str, Any], size: Size, shape: Shape, rounds: Rounds, device: str) -> Records:
    """All numbers of one case."""
    classes, once = labels["vocab_size"], labels["prompt_once"]
    batch, denoiser = make_problem(classes, size, shape, once)
    batch, denoiser = batch.to(device), denoiser.to(device)
    policy = make_policy(labels["policy"], batch, denoiser, shape)
    rows = list(torch.arange(len(batch), device=device).split(labels["batch_size"]))
    parts = [(batch.rows(ids).trimmed(), ids) for ids in rows]
    assert all(part.prefix for part, _ in parts)  # asked once, before anything is timed
    steps, generator = shape.steps, torch.Generator()

    def decoded(network: Any) -> list[DecodeOutput]:
        options = {"max_steps": steps, "generator": generator}
        return [decode(network, policy, part, row_ids=ids, **options) for part, ids in parts]

    def loop(network: Any) -> list[tuple[Tensor, Tensor]]:
        return [reference_loop(network, policy, part, steps, ids) for part, ids in parts]

    variants: dict[str, Callable[[], object]]
    if once:
        variants = {DECODE: partial(decoded, denoiser), REREAD: partial(decoded, Split(denoiser))}
        return compare(variants, rounds, device)
    counted, plain = Counted(denoiser), Counted(denoiser)
    outputs, same = decoded(counted), list[Tensor]()
    for (part, _), output, (sequences, nfe) in zip(parts, outputs, loop(plain), strict=True):
        same.append(((output.sequences == sequences) | ~part.latent).all(-1) & (output.nfe == nfe))
    own = sum(int(output.nfe.sum()) for output in outputs)
    share = sum(counted.positions) / sum(state.numel() for state, _ in counted.batches)
    variants = {DECODE: partial(decoded, denoiser), REFERENCE: partial(loop, denoiser)}
    if len(parts) == 1:
        variants[FORWARDS] = partial(forwards, denoiser, counted.batches)
        variants[NEEDED] = partial(needed_forwards, denoiser, counted.batches, counted.positions)
    return [
        {"metric": "row_forward_ratio", "value": counted.rows / own, "variant": DECODE},
        {"metric": "row_forward_ratio", "value": plain.rows / own, "variant": REFERENCE},
        {"metric": "head_share", "value": share, "variant": DECODE},
        {"metric": "same_rows", "value": torch.cat(same).double().mean(), "variant": REFERENCE},
        {"metric": "nfe", "value": own / len(batch), "variant": DECODE},
        *compare(variants, rounds, device),
    ]


def compare(variants: dict[str, Callable[[], object]], rounds: Rounds, device: str) -> Records:
    """Ratios of decoding to everything else, and seconds."""
    for variant in variants.values():
        variant()
    timing = take_turns(variants, rounds, torch.device(device))
    ratios = [record for other in list(variants)[1:] for record in timing.ratios(DECODE, other)]
    return ratios + [record for record in timing.seconds() if record["metric"] == "seconds"]


if __name__ == "__main__":
    command(main)
