"""Policies behind the interface of a diffusers scheduler, for loops that call the denoiser themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orderppl.config import describe
from orderppl.decoding.step import keep_rows, token_writer, unmask
from orderppl.errors import UserError
from orderppl.policies import Blocks, Policy
from orderppl.randomness import SELECTION, generator_seed, row_noise
from orderppl.unmasking import Batch, State
from orderppl.unmasking.denoiser import Reader
from orderppl.unmasking.predictions import MaskedOnly


@dataclass
class SchedulerOutput:
    """Result of `RevealScheduler.step`.

    Attributes:
        prev_sample: int64 [B, S], what the denoiser reads next.
        reveal: bool [B, S], the positions revealed by this step.
        fallback: bool [B], rows whose policy selected nothing, so that its first position was revealed.
    """

    prev_sample: Tensor
    reveal: Tensor
    fallback: Tensor


class RevealScheduler:
    """Decides what to reveal, and writes it, given the denoiser's output.

        scheduler = RevealScheduler(Ranked("entropy"), mask_token_id)
        scheduler.set_timesteps(16)
        for t in scheduler.timesteps:
            logits = denoiser(sample, attention_mask)
            sample = scheduler.step(logits, t, sample, generator=generator).prev_sample

    A sample holds MASK where something is to be written; what else it holds is given and stays. The result is that of
    `decode`, which also spares finished rows their forwards.

    Args:
        policy: decides the reveal sets.
        mask_token_id: id of MASK.
        temperature: of token sampling; 0 takes the most likely token.
        block_size: semi-autoregressive blocks of so many positions.
        mode: take most probable sets instead of draws.

    Raises:
        UserError: a negative temperature.
    """

    def __init__(
        self,
        policy: Policy,
        mask_token_id: int,
        temperature: float = 0.0,
        block_size: int | None = None,
        mode: bool = False,
    ) -> None:
        if not temperature >= 0:
            raise UserError("temperature", f"{temperature} is negative", "give 0 for the most likely token, or more")
        self.arguments = {
            "policy": policy,
            "mask_token_id": mask_token_id,
            "temperature": temperature,
            "block_size": block_size,
            "mode": mode,
        }
        self.policy = policy if block_size is None else Blocks(policy, block_size)
        self.mask_token_id, self.temperature, self.mode = mask_token_id, temperature, mode
        self.timesteps = torch.empty(0, dtype=torch.int64)
        self._carry: Any = None
        self._rows: Any = None  # those that are not finished

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, the policy as `orderppl.config.describe` writes it."""
        written: dict[str, Any] = describe(self.arguments)
        return written

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Start over with a budget; `timesteps` int64 [T] holds the steps left after each, T - 1 to 0.

        Args:
            num_inference_steps: T.
            device: accepted for the sake of its callers; the host counts the steps.
        """
        if num_inference_steps < 1:
            raise UserError("num_inference_steps", f"a budget of {num_inference_steps} steps", "allow at least 1")
        self.timesteps, self._rows = torch.arange(num_inference_steps).flip(0), None

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        row_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Reveal one set.

        Args:
            model_output: float [B, S, V], logits of the denoiser for `sample`.
            timestep: of `timesteps`, in their order.
            sample: int64 [B, S].
            attention_mask: bool [B, S], False at padding; all True when left out.
            generator: only its seed is used; see `decode`.
            row_ids: int64 [B], identity of each row for the noise; 0..B-1 when left out.
            return_dict: False returns `(prev_sample,)`.

        Raises:
            UserError: a timestep that is not of this budget, output of another shape than the sample, or a policy that
                asks the denoiser about another state.
        """
        num_steps, step = len(self.timesteps), len(self.timesteps) - 1 - int(timestep)
        if not 0 <= step < num_steps:
            raise UserError("timestep", f"{int(timestep)} in a budget of {num_steps}", "call set_timesteps first")
        if model_output.shape[:2] != sample.shape:
            problem = f"{tuple(model_output.shape)} for a sample of {tuple(sample.shape)}"
            raise UserError("model_output", problem, "give logits of every position")
        if step > 0 and self._rows is None:
            problem = f"{int(timestep)} before the first one, {num_steps - 1}"
            raise UserError("timestep", problem, "go through `timesteps` in their order")
        masked = sample == self.mask_token_id
        if attention_mask is not None:
            masked = masked & attention_mask.bool()
        if step == 0:
            self._latent, self._rows = masked, torch.arange(len(sample), device=sample.device)
            self._carry = None
        keep = masked.any(-1)[self._rows]  # finished rows take no part
        self._rows = rows = self._rows[keep]
        self._carry = keep_rows(self._carry, keep)
        nowhere = torch.zeros_like(sample, dtype=torch.bool)
        output = SchedulerOutput(sample.clone(), nowhere, nowhere.any(-1))
        if len(rows):
            self._reveal(output, model_output[rows], masked[rows], step, attention_mask, generator, row_ids)
        return output if return_dict else (output.prev_sample,)

    def _reveal(
        self,
        output: SchedulerOutput,
        logits: Tensor,
        masked: Tensor,
        step: int,
        attention_mask: Tensor | None,
        generator: torch.Generator | None,
        row_ids: Tensor | None,
    ) -> None:
        rows, num_steps, seed = self._rows, len(self.timesteps), generator_seed(generator)
        tokens = output.prev_sample[rows]
        seen = torch.ones_like(output.reveal) if attention_mask is None else attention_mask
        attended = seen[rows]
        batch = Batch(tokens, attended, given=~self._latent[rows])
        known = _KnownOutput(logits, self.mask_token_id)
        ids = torch.arange(len(output.prev_sample), device=tokens.device) if row_ids is None else row_ids
        now = torch.full(rows.shape, step, device=tokens.device)
        hidden = masked.sum(-1).tolist()
        predictions = MaskedOnly(Reader(known, batch), tokens, masked, sum(hidden))
        noise = None if self.mode else partial(row_noise, seed, ids[rows], now, batch.latent, SELECTION)
        state = State(tokens, masked, now, num_steps, batch, known, predictions, noise, self._carry)
        write = token_writer(self.temperature, seed, ids, rows)
        done = unmask(self.policy, state, hidden, write, is_last=step == num_steps - 1)
        self._carry = done.carry
        output.prev_sample[rows] = done.tokens
        output.reveal[rows] = done.reveal
        if done.fallback is not None:
            output.fallback[rows] = done.fallback


class _KnownOutput:
    """Stands for the denoiser whose output for the sample is at hand."""

    def __init__(self, logits: Tensor, mask_index: int) -> None:
        self.logits, self.mask_index, self.vocab_size = logits, mask_index, logits.shape[-1]

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        if state.shape != self.logits.shape[:2]:
            problem = "asks the denoiser about another state than the sample"
            raise UserError("policy", problem, "use decode, which has the denoiser")
        return self.logits
