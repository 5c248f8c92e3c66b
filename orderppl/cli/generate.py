"""Write behind prompts or fill holes with a learned order, and watch the text being revealed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orderppl.cli.hints import any_class
from orderppl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from orderppl.data import Tokenizer
    from orderppl.runs import Run
    from orderppl.unmasking import Batch

HIDDEN = "░"
Show = Callable[[str, str], None]


@dataclass(frozen=True, kw_only=True)
class Config:
    r"""Write behind prompts or fill holes with a learned order, and watch the text being revealed.

        orderppl generate runs/gsm8k --template "Tom has 3 [MASK] and buys [MASK] more."
        orderppl generate OWNER/NAME --prompt "2 + 3 =" --length 16
        orderppl generate runs/mine --prompt '["2 + 3 =", "7 * 6 ="]' --out answers.json
        orderppl generate my-order --denoiser load_denoiser --denoiser.name_or_path GSAI-ML/LLaDA-8B-Instruct \
            --trust_remote_code --prompt "2 + 3 ="
        orderppl generate --policy Threshold --denoiser load_denoiser --denoiser.name_or_path bert-base-uncased \
            --template "Paris is the [MASK] of [MASK]."           # no learned order at all

    Args:
        run: run folder, or folder or hub name of a shared order.
        prompt: what to write behind; several as a list.
        template: text with holes, each [MASK] one token; several as a list.
        length: of the responses to prompts, tokens; the longest of the training data when left out.
        steps: step budget; that of the run when left out.
        temperature: of the tokens; 0 takes the most likely.
        mode: play the most probable sets; false: draw them; as it was shared when left out.
        policy: another policy than the run's, or a wrapper of it, such as AtPrice.
        denoiser: another denoiser than the run's.
        seed: of everything random.
        trust_remote_code: run code that comes with the order or its denoiser.
        out: JSON file of the texts.
        device: such as cpu or cuda:0.
    """

    run: str | None = None
    prompt: str | list[str] = field(default_factory=list)
    template: str | list[str] = field(default_factory=list)
    length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    mode: bool | None = None
    policy: any_class("orderppl.policies.Policy") | None = None  # type: ignore[valid-type]
    denoiser: any_class("orderppl.unmasking.Denoiser") | None = None  # type: ignore[valid-type]
    seed: int = 0
    trust_remote_code: bool = False
    out: str | None = None
    device: str = "cpu"
    POSITIONAL = "run"


def run(config: Config) -> None:
    """Load the order, and decode one text after another."""
    import torch

    from orderppl.cli.assemble import check_device
    from orderppl.decoding import decode
    from orderppl.files import write_text

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
                _watched(order.policy, partial(_show_state, show, tokenizer)),
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
    from orderppl.cli.assemble import Known, make_denoiser
    from orderppl.config import Builder
    from orderppl.runs import Run, load_order

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
    from orderppl.data import prompt_batch, template_batch

    templates = [config.template] if isinstance(config.template, str) else config.template
    prompts = [config.prompt] if isinstance(config.prompt, str) else config.prompt
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


def _watched(policy: Any, show: Callable[[Tensor], None]) -> Any:
    """A policy that shows what it is about to decide on."""
    from orderppl.policies.wrappers import Wrapper

    class Watched(Wrapper):
        def forward(self, state: Any) -> Any:
            show(state.tokens.reshape(-1, state.tokens.shape[-1])[0])
            return super().forward(state)

    return Watched(policy)


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
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(soft_wrap=True)
    console.print(Text(text, style="bold"))
    if not console.is_terminal:
        yield lambda note, shown: console.print(Text(f"{shown} {note}".strip()))
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda note, shown: live.update(Text(f"{shown} {note}".strip()), refresh=True)
