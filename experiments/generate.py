"""Generate with a shared order, and watch the text being revealed.

    orderppl generate --policy my-order --denoiser GSAI-ML/LLaDA-8B-Instruct --trust-remote-code --prompt "2 + 3 ="
    orderppl generate --policy OWNER/NAME --prompt "2 + 3 =" --prompt "7 * 6 =" --length 16

Without --denoiser it takes the one that the order was learned for. results.json holds the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from orderppl.data.tokenizers import Tokenizer
from orderppl.decoding import decode
from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.results import Record
from orderppl.experiments.share import DENOISER_FOLDER
from orderppl.models import OrderPolicy
from orderppl.models.denoisers import denoiser_tokenizer, load_denoiser

HIDDEN = "░"
Show = Callable[[str, str], None]


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of generate."""

    policy: str = setting("my-order", "folder or hub name of a shared order", option="--policy")
    denoiser: str | None = setting(None, "folder or hub name of the denoiser", option="--denoiser")
    prompt: tuple[str, ...] = setting((), "prompt; may be given several times", option="--prompt")
    length: int | None = setting(None, "response tokens; as in training when left out", at_least=1, option="--length")
    steps: int | None = setting(None, "step budget; as in training when left out", at_least=1, option="--steps")
    temperature: float = setting(0.0, "of the tokens; 0 takes the most likely", at_least=0, option="--temperature")
    revision: str | None = setting(None, "branch, tag or commit of the denoiser", option="--revision")
    policy_revision: str | None = setting(None, "branch, tag or commit of the order", option="--policy-revision")
    trust_remote_code: bool = setting(False, "run the denoiser's own code", option="--trust-remote-code")
    tokenizer: str | None = setting(None, "tokeniser, where the denoiser has none", option="--tokenizer")


def run(config: Config, out: Path) -> Iterable[Record]:
    """Load the order and its denoiser, and decode one prompt after another."""
    policy = OrderPolicy.from_pretrained(config.policy, revision=config.policy_revision, device=config.device)
    name = config.denoiser or _default_denoiser(config.policy, policy)
    trust = config.trust_remote_code
    tokenizer = denoiser_tokenizer(name, tokenizer=config.tokenizer, revision=config.revision, trust_remote_code=trust)
    denoiser = load_denoiser(
        name,
        revision=config.revision,
        trust_remote_code=trust,
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )
    policy.check(denoiser, tokenizer)
    length = config.length or policy.training_data.get("response_length")
    if length is None:
        raise UserError("--length", "the order does not say how long its responses were", "give it")
    records: list[Record] = []
    for index, prompt in enumerate(config.prompt or ("",)):
        ids = tokenizer.encode(prompt)
        if ids and policy.training_data.get("separator"):
            ids.append(tokenizer.eos_index)
        steps = config.steps or policy.num_steps
        with watching(prompt) as show:
            output = decode(
                Watched(denoiser, tokenizer, int(length), show),
                policy,
                torch.tensor([ids]) if ids else None,
                length=int(length),
                max_steps=steps,
                temperature=config.temperature,
                generator=torch.Generator().manual_seed(config.seed),
                row_ids=torch.tensor([index]),
                device=config.device,
                pad_token_id=tokenizer.pad_index,
            )
            text = tokenizer.decode(output.sequences[0].tolist())
            show(f"({int(output.nfe[0])} forwards)", text)
        labels = {"prompt": prompt, "text": text, "steps": steps, "seed": config.seed}
        records.append({"metric": "nfe", "value": int(output.nfe[0]), **labels})
    return records


def _default_denoiser(source: str, policy: OrderPolicy) -> str:
    beside = Path(source) / DENOISER_FOLDER
    if beside.is_dir():
        return str(beside)
    if policy.denoiser is None or policy.denoiser.name is None:
        raise UserError("--denoiser", f"{source} does not name the denoiser it was learned for", "give its folder")
    return policy.denoiser.name


@dataclass
class Watched:
    """A denoiser that shows what it is about to read.

    Attributes:
        denoiser: what reads.
        tokenizer: what spells.
        length: response tokens.
        show: gets a note and the response of the first row as far as it is revealed.
    """

    denoiser: Denoiser
    tokenizer: Tokenizer
    length: int
    show: Show

    def __post_init__(self) -> None:
        """Take over what a denoiser is known by."""
        self.mask_index, self.vocab_size = self.denoiser.mask_index, self.denoiser.vocab_size

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `Denoiser`."""
        self.show("", spell(state[0, -self.length :], self.tokenizer))
        return self.denoiser(state, attention_mask)


def spell(tokens: Tensor, tokenizer: Tokenizer) -> str:
    """Text of a response int64 [L] revealed in part, up to its end where that is known."""
    ids = tokens.tolist()
    if tokenizer.eos_index in ids:
        ids = ids[: ids.index(tokenizer.eos_index)]
    runs = ((hidden, list(run)) for hidden, run in groupby(ids, key=lambda token: token == tokenizer.mask_index))
    return "".join(HIDDEN * len(run) if hidden else tokenizer.decode(run) for hidden, run in runs)


@contextmanager
def watching(prompt: str) -> Iterator[Show]:
    """A line that changes in a terminal; one line after another elsewhere."""
    console = Console(soft_wrap=True)
    if prompt:
        console.print(Text(prompt, style="bold"))
    if not console.is_terminal:
        yield lambda note, text: console.print(Text(f"{text} {note}".strip()))
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda note, text: live.update(Text(f"{text} {note}".strip()), refresh=True)
