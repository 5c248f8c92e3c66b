"""A learned order as one thing to save, share and decode with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.data.tokenizers import Tokenizer, tokenizer_fingerprint
from orderppl.decoding import NetworkPlan, PlannedOrder, Policy, StochasticDecision
from orderppl.decoding.policy import policy_score
from orderppl.denoising import Canvas, Denoiser
from orderppl.distributions import SetLaw, StepwiseReveal
from orderppl.errors import UserError
from orderppl.hub import fetch
from orderppl.inference.checkpoints import TEMPORARY, file_digest, load_weights, write_tensors, write_text
from orderppl.models.architectures import build, describe
from orderppl.models.price import PriceRange
from orderppl.models.priors import RevealPrior, StepPrice
from orderppl.states import UnmaskingState

CONFIG, WEIGHTS, CARD = "order_policy.json", "order_policy.safetensors", "README.md"
FORMAT = 1


@dataclass(frozen=True)
class DenoiserIdentity:
    """The denoiser that an order was learned for.

    Attributes:
        vocab_size: number of token classes V of its output head.
        mask_index: id of MASK.
        tokenizer: fingerprint of its tokeniser (see `tokenizer_fingerprint`); None when it reads no text.
        name: folder or hub name.
        revision: branch, tag or commit on the hub.
    """

    vocab_size: int
    mask_index: int
    tokenizer: str | None = None
    name: str | None = None
    revision: str | None = None

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        tokenizer: Tokenizer | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> DenoiserIdentity:
        """That of a denoiser and its tokeniser."""
        known = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        return cls(denoiser.vocab_size, denoiser.mask_index, known, name, revision)

    def check(self, denoiser: Denoiser, tokenizer: Tokenizer | None = None) -> None:
        """Refuse a denoiser whose token ids mean something else.

        Raises:
            UserError: another vocabulary or MASK.
        """
        problem = None
        if denoiser.vocab_size != self.vocab_size:
            problem = f"has {denoiser.vocab_size} token classes, the order was learned for {self.vocab_size}"
        elif denoiser.mask_index != self.mask_index:
            problem = f"has MASK {denoiser.mask_index}, the order was learned for MASK {self.mask_index}"
        elif tokenizer is not None and self.tokenizer not in (None, tokenizer_fingerprint(tokenizer)):
            problem = f"has other tokens than those the order was learned for (fingerprint {self.tokenizer})"
        if problem is not None:
            remedy = f"use {self.name}, or learn an order for this one" if self.name else "learn an order for this one"
            raise UserError("denoiser", problem, remedy)


def as_policy(
    learned: nn.Module, decision: str = "mode", beta: float | None = None, price: float | None = None
) -> Policy:
    """What was learned, as a decoding policy.

    Args:
        learned: a reveal prior, or the network of a plan of the whole order: (None, attention_mask, context,
            context_mask) -> step logits.
        decision: how probabilities become reveal sets: "mode", "sample" or, for a plan, "rank" (see `PlannedOrder`).
        beta: factor on the reveal probabilities of a prior, see `StochasticDecision`; as learned when left out.
        price: of a step, nats, for a prior that was learned for a range of prices; its middle when left out.

    Raises:
        UserError: a dial that what was learned does not have.
    """
    if not isinstance(learned, RevealPrior):
        if beta is not None or price is not None:
            name = "beta" if beta is not None else "price"
            raise UserError(name, "a plan has no such dial", "leave it out")
        return PlannedOrder(NetworkPlan(learned), decision)
    prior: Policy = learned
    if isinstance(learned, StepPrice) and isinstance(learned.price, PriceRange):
        prior = learned.at(learned.price.middle if price is None else price)
    elif price is not None:
        problem = f"{type(learned).__name__} was not learned for a range of prices"
        raise UserError("price", problem, "leave it out")
    if decision == "mode" and beta is None:
        return prior
    assert isinstance(prior, RevealPrior)
    return StochasticDecision(prior, decision, 1.0 if beta is None else beta)


class OrderPolicy(nn.Module):
    """A learned prior or plan, the denoiser it was learned for, and how it is decoded.

    A decoding policy: `decode(denoiser, policy, ..., max_steps=policy.num_steps)`.

    Args:
        learned: see `as_policy`.
        num_steps: the step budget T it was learned for.
        denoiser: what it was learned for; None checks nothing.
        decision: see `as_policy`.
        beta: see `as_policy`.
        price: see `as_policy`.
        training: how it was learned: data, settings, such as `temperature` and `step_price`; JSON values.
        results: records of what it was measured to do; JSON values.

    Raises:
        UserError: see `as_policy`.
    """

    def __init__(
        self,
        learned: nn.Module,
        num_steps: int,
        denoiser: DenoiserIdentity | None = None,
        *,
        decision: str = "mode",
        beta: float | None = None,
        price: float | None = None,
        training: Mapping[str, Any] | None = None,
        results: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.learned, self.num_steps, self.denoiser = learned, num_steps, denoiser
        self.decision, self.beta, self.price = decision, beta, price
        self.training_data: dict[str, Any] = dict(training or {})
        self.results = [dict(record) for record in results]
        self._policy = (as_policy(learned, decision, beta, price),)  # in a tuple: no second name for the same weights

    @property
    def policy(self) -> Policy:
        """What decides."""
        return self._policy[0]

    @property
    def needs_noise(self) -> bool:
        """Whether it draws its sets."""
        return bool(getattr(self.policy, "needs_noise", False))

    @property
    def remembers(self) -> bool:
        """Whether it keeps something between the steps of a decoding."""
        return bool(getattr(self.policy, "remembers", False))

    def check(self, denoiser: Denoiser, tokenizer: Tokenizer | None = None) -> None:
        """Refuse another denoiser than it was learned for; see `DenoiserIdentity.check`."""
        if self.denoiser is not None:
            self.denoiser.check(denoiser, tokenizer)

    def select(self, state: UnmaskingState) -> Tensor:
        """Return the reveal set, bool [*, L].

        Raises:
            UserError: the denoiser has another vocabulary or MASK.
        """
        self.check(state.canvas.denoiser)
        return self.policy.select(state)

    def score(self, state: UnmaskingState) -> Tensor:
        """What ranks the positions where nothing is selected, float [*, L]."""
        return policy_score(self.policy, state)

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Law of the next reveal set, as it was learned; errors as of `select`."""
        self.check(state.canvas.denoiser)
        if not isinstance(self.learned, RevealPrior):
            plan = StepwiseReveal(self._plan(state.canvas), state.canvas.attention_mask)
            return plan.set_at(state.masked, state.step)
        prior = self.policy.policy if isinstance(self.policy, StochasticDecision) else self.policy
        assert isinstance(prior, RevealPrior)
        return prior.distribution(state)

    def _plan(self, canvas: Canvas) -> Tensor:
        """Step logits of the plan, float [B, L, T]; one denoiser call where it reads the opening."""
        plan_from = getattr(self.learned, "plan_from", None)
        if plan_from is None:
            return NetworkPlan(self.learned)(canvas)
        hidden = torch.full_like(canvas.attention_mask, canvas.mask_index, dtype=torch.long)
        logits: Tensor = plan_from(canvas.logits(hidden).log_softmax(-1), canvas.attention_mask)
        return logits

    # ---- on disk

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights (safetensors), configuration (JSON) and a card into a folder.

        A new folder appears complete. In an existing one the files are replaced one by one, the configuration last,
        which names the weights by their hash.

        Raises:
            UserError: `folder` is a file, or something in the policy is no architecture that could be rebuilt.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError("policy", f"{folder} is a file", "give a folder")
        architecture = describe(self.learned)
        target = folder if folder.exists() else folder.with_name(TEMPORARY + folder.name)
        if target != folder:
            shutil.rmtree(target, ignore_errors=True)  # of a process that was killed
            target.mkdir(parents=True)
        write_tensors(target / WEIGHTS, self.learned.state_dict())
        config = {
            "format": FORMAT,
            "weights": file_digest(target / WEIGHTS),
            "dtype": str(next(self.learned.parameters(), torch.empty(0)).dtype).removeprefix("torch."),
            "architecture": architecture,
            "num_steps": self.num_steps,
            "decision": self.decision,
            "beta": self.beta,
            "price": self.price,
            "denoiser": None if self.denoiser is None else asdict(self.denoiser),
            "training": self.training_data,
            "results": self.results,
        }
        write_text(target / CARD, self._card())
        write_text(target / CONFIG, json.dumps(config, indent=2) + "\n")
        if target != folder:
            os.replace(target, folder)
        return folder

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, device: torch.device | str = "cpu"
    ) -> OrderPolicy:
        """Load what `save_pretrained` wrote, without pickle and without code.

        Args:
            name_or_path: a folder or a hub name.
            revision: branch, tag or commit on the hub.
            device: where it goes.

        Raises:
            UserError: there is no such policy, or it is damaged, or of a newer format.
        """
        folder = fetch(name_or_path, revision, files=(CONFIG, WEIGHTS), field="policy")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if config["format"] != FORMAT:
                problem = f"{name_or_path} has format {config['format']}, this version reads {FORMAT}"
                raise UserError("policy", problem, "update orderppl")
            if config["weights"] != file_digest(folder / WEIGHTS):
                problem = f"the weights of {name_or_path} are not those its {CONFIG} was written for"
                raise UserError("policy", problem, "save or download it again")
            learned = build(config["architecture"]).to(getattr(torch, config["dtype"]))
            known = config["denoiser"]
            policy = cls(
                learned,
                config["num_steps"],
                None if known is None else DenoiserIdentity(**known),
                decision=config["decision"],
                beta=config["beta"],
                price=config["price"],
                training=config["training"],
                results=config["results"],
            )
        except UserError:
            raise
        except OSError as error:
            problem = f"{name_or_path} holds no {CONFIG} with {WEIGHTS}"
            raise UserError("policy", problem, "write one by: orderppl share --run RUN --out FOLDER") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            problem = f"{CONFIG} of {name_or_path} is damaged ({type(error).__name__}: {reason})"
            raise UserError("policy", problem, "save or download it again") from error
        load_weights(learned, folder / WEIGHTS)
        policy.eval().requires_grad_(False)
        return policy.to(device)

    def _card(self) -> str:
        """What the hub shows of it."""
        known = self.denoiser
        lines = ["---", "library_name: orderppl", "tags: [masked-diffusion, generation-order]"]
        if known is not None and known.name is not None and len(known.name.split("/")) == 2:
            lines.append(f"base_model: {known.name}")
        lines += ["---", "", "# A learned generation order", ""]
        lines.append(f"In which order, and how many at a time, to reveal tokens in at most {self.num_steps} steps.")
        if known is not None:
            lines.append(f"Learned for {known.name or 'a denoiser'}: V = {known.vocab_size}, MASK {known.mask_index}.")
        lines += ["", "```python", "from orderppl.models import OrderPolicy", ""]
        lines += ['policy = OrderPolicy.from_pretrained("this folder")', "```", ""]
        return "\n".join(lines)
