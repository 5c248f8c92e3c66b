"""What `orderppl generate` does: canvases of prompts and templates, decoded while somebody watches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from orderppl.cli.assemble import Known, check_device, make_denoiser
from orderppl.cli.generate import Config
from orderppl.config import Builder
from orderppl.data.prompts import prompt_batch, template_batch
from orderppl.data.tokenizers import Tokenizer
from orderppl.decoding.decode import decode
from orderppl.distributions import SetDistribution
from orderppl.errors import UserError
from orderppl.files import write_text
from orderppl.policies import Policy
from orderppl.policies.wrappers import Wrapper
from orderppl.runs import Run, load_order
from orderppl.unmasking import Batch, State

HIDDEN = "░"
Show = Callable[[str, str], None]


def write(config: Config) -> None:
    """Load the order, and decode one text after another."""
    check_device(config.device)
    order = _order(config)
    tokenizer = order.tokenizer
    if tokenizer is None:
        raise UserError("denoiser", "it has no tokeniser, so it writes no text", "give one for text")
    mode = order.mode if config.mode is None else config.mode
    found: list[dict[str, Any]] = []
    for index, (text, batch) in enumerate(_canvases(config, order, tokenizer)):
        longest = int(batch.latent.sum(-1).max())
        steps = config.steps or (min(order.num_steps, longest) if order.kind != "denoiser" else longest)
        with watching(text) as show:
            output = decode(
                order.denoiser,
                Watched(order.policy, partial(_show_state, show, tokenizer)),
                batch.to(config.device),
                max_steps=steps,
                mode=mode,
                temperature=config.temperature,
                generator=torch.Generator().manual_seed(config.seed),
                row_ids=torch.tensor([index], device=config.device),
            )
            written = spell(output.sequences[0], tokenizer)
            show(f"({int(output.nfe[0])} forwards)", written)
        response = tokenizer.decode(output.sequences[0][batch.latent[0].to(config.device)].tolist())
        found.append({"given": text, "text": written, "revealed": response, "forwards": int(output.nfe[0])})
    if config.out is not None:
        write_text(Path(config.out), json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _order(config: Config) -> Run:
    """The run, or a denoiser with a policy that nothing is learned for."""
    builder = Builder(Known())
    other = None if config.denoiser is None else make_denoiser(builder, _trusting(config), None).to(config.device)
    if config.run is not None:
        trust = config.trust_remote_code
        order = load_order(config.run, other, trust_remote_code=trust, device=config.device)
    elif other is None:
        raise UserError("run", "there is no order", "give a run folder or a shared order, or --denoiser")
    else:
        order = Run(Path(), "denoiser", {}, {"response": {}}, denoiser=other)
    if config.policy is not None:
        builder.known["policy"] = order.policy
        order.policy = builder.make(config.policy, "policy")
    elif order.policy is None:
        order.policy = builder.make({"class_path": "orderppl.policies.Ranked", "init_args": {"score": "top_prob"}})
    return order


def _trusting(config: Config) -> dict[str, Any]:
    """The denoiser's description, with what --trust_remote_code says."""
    spec = dict(config.denoiser or {})
    if config.trust_remote_code and "trust_remote_code" in spec.get("init_args", {}):
        spec["init_args"] = {**spec["init_args"], "trust_remote_code": True}
    return spec


def _canvases(config: Config, order: Run, tokenizer: Tokenizer) -> Iterator[tuple[str, Batch]]:
    """Every text with its canvas, one row each."""
    templates, prompts = config.template, config.prompt
    if not templates and not prompts:
        raise UserError("prompt", "there is no text", "give --prompt, or --template with [MASK] in it")
    for text in templates:
        yield text, template_batch([text], tokenizer)
    known = order.info["response"]
    if prompts and config.length is None and not known.get("length"):
        raise UserError("length", "the order does not say how long its responses were", "give --length")
    length = config.length or known["length"] - (known["prompt_length"] or 0) if prompts else 0
    for text in prompts:
        yield text, prompt_batch([text], tokenizer, length, separator=known.get("separator_index") is not None)


def _show_state(show: Show, tokenizer: Tokenizer, tokens: Tensor) -> None:
    show("", spell(tokens, tokenizer))


class Watched(Wrapper):
    """A policy that shows what it is about to decide on.

    Args:
        policy: the policy.
        show: gets the first row, int64 [S].
    """

    def __init__(self, policy: Policy, show: Callable[[Tensor], None]) -> None:
        super().__init__(policy)
        self.show = show

    def forward(self, state: State) -> SetDistribution:
        """Show, then decide."""
        self.show(state.tokens.reshape(-1, state.tokens.shape[-1])[0])
        return super().forward(state)


def spell(tokens: Tensor, tokenizer: Tokenizer) -> str:
    """Text of a canvas int64 [S] revealed in part, up to its end where that is known."""
    ids = tokens.tolist()[len(tokenizer.frame[0]) :]
    if tokenizer.eos_index in ids and tokenizer.mask_index not in ids[: ids.index(tokenizer.eos_index)]:
        rest = ids[ids.index(tokenizer.eos_index) + 1 :]
        ids = (
            ids
            if any(token not in (tokenizer.eos_index, tokenizer.pad_index) for token in rest)
            else ids[: -len(rest) - 1]
        )
    runs = ((hidden, list(run)) for hidden, run in groupby(ids, key=lambda token: token == tokenizer.mask_index))
    return "".join(HIDDEN * len(run) if hidden else _text(run, tokenizer) for hidden, run in runs)


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text of tokens on both sides of an end token, such as the one between a prompt and its response."""
    pieces = [list(run) for ends, run in groupby(ids, key=lambda token: token == tokenizer.eos_index) if not ends]
    return " ".join(tokenizer.decode(piece) for piece in pieces)


@contextmanager
def watching(text: str) -> Iterator[Show]:
    """A line that changes in a terminal; one line after another elsewhere."""
    console = Console(soft_wrap=True)
    console.print(Text(text, style="bold"))
    if not console.is_terminal:
        yield lambda note, shown: console.print(Text(f"{shown} {note}".strip()))
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda note, shown: live.update(Text(f"{shown} {note}".strip()), refresh=True)
