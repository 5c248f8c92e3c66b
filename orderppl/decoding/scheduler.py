"""Policies behind the interface of a diffusers scheduler, for loops that call the denoiser themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.decoding.memory import first_memory
from orderppl.decoding.policy import Policy, needs_noise
from orderppl.decoding.predictions import DecodingState, Predictions
from orderppl.decoding.step import token_writer, unmask
from orderppl.decoding.wrappers import Block
from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.randomness import SELECTION, generator_seed, uniform_noise


@dataclass
class SchedulerOutput:
    """Result of `RevealScheduler.step`.

    Attributes:
        prev_sample: int64 [B, S], what the denoiser reads next.
        reveal: bool [B, S], the positions revealed by this step.
        fallback: bool [B], rows whose policy selected nothing, so that its arg-max was revealed.
    """

    prev_sample: Tensor
    reveal: Tensor
    fallback: Tensor


class RevealScheduler:
    """Decides what to reveal, and writes it, given the denoiser's output.

        scheduler = RevealScheduler(make_policy("entropy"), mask_token_id)
        scheduler.set_timesteps(16)
        for t in scheduler.timesteps:
            logits = denoiser(sample, attention_mask)
            sample = scheduler.step(logits, t, sample, generator=generator).prev_sample

    A sample holds MASK where a response is to be written; what else it holds is prompt or padding and stays. The result
    is that of `decode`, which also spares finished rows their forwards.

    Args:
        policy: decides the reveal sets.
        mask_token_id: id of MASK.
        temperature: of token sampling; 0 takes the most likely token.
        block_size: semi-autoregressive blocks of so many response positions.
    """

    def __init__(
        self, policy: Policy, mask_token_id: int, temperature: float = 0.0, block_size: int | None = None
    ) -> None:
        if not temperature >= 0:
            raise UserError("temperature", f"{temperature} is negative", "give 0 for the most likely token, or more")
        self.policy = policy if block_size is None else Block(policy, block_size)
        self.mask_token_id = mask_token_id
        self.temperature = temperature
        self.timesteps = torch.empty(0, dtype=torch.int64)

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Start over with a budget; `timesteps` int64 [T] holds the steps left after each, T - 1 to 0."""
        if num_inference_steps < 1:
            raise UserError("num_inference_steps", f"a budget of {num_inference_steps} steps", "allow at least 1")
        self.timesteps = torch.arange(num_inference_steps).flip(0)  # on the host, which counts the steps

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        prompt_length: int = 0,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        row_ids: Tensor | None = None,
    ) -> SchedulerOutput:
        """Reveal one set.

        Args:
            model_output: float [B, S, V], logits of the denoiser for `sample`.
            timestep: of `timesteps`, in their order.
            sample: int64 [B, S].
            prompt_length: leading positions that learned policies read as the prompt.
            attention_mask: bool [B, S], False at padding of the prompt; all True when left out.
            generator: only its seed is used; see `decode`.
            row_ids: int64 [B], identity of each row for the noise; 0..B-1 when left out.

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
        masked = (sample == self.mask_token_id)[:, prompt_length:]
        if step == 0:
            self._response, self._rows = masked, torch.arange(len(sample), device=sample.device)
            self._memory = first_memory(self.policy, self._rows)
        keep = masked.any(-1)[self._rows]  # finished rows take no part
        self._rows = rows = self._rows[keep]
        self._memory = {key: value[keep] for key, value in self._memory.items()}
        nowhere = torch.zeros_like(sample, dtype=torch.bool)
        output = SchedulerOutput(sample.clone(), nowhere, nowhere.any(-1))
        if len(rows) == 0:
            return output
        context, context_mask = None, None
        if prompt_length:
            context = sample[rows, :prompt_length]
            context_mask = None if attention_mask is None else attention_mask[rows, :prompt_length]
        known = _KnownOutput(model_output[rows], self.mask_token_id)
        canvas = Canvas(known, self._response[rows], context, context_mask)
        ids = torch.arange(len(sample), device=sample.device) if row_ids is None else row_ids
        seed, length = generator_seed(generator), masked.shape[-1]
        noise = uniform_noise(seed, ids[rows], step, length, SELECTION) if needs_noise(self.policy) else None
        tokens, left = sample[rows, prompt_length:], masked[rows]
        predictions = Predictions(canvas, tokens, left, int(left.sum()))
        state = DecodingState(predictions, tokens, step, num_steps, noise, self._memory)
        done = unmask(self.policy, state, token_writer(self.temperature, seed, ids[rows]), step == num_steps - 1)
        output.prev_sample[rows, prompt_length:] = done.tokens
        output.reveal[rows, prompt_length:] = done.reveal
        if done.fallback is not None:
            output.fallback[rows] = done.fallback
        return output


class _KnownOutput:
    """Stands for the denoiser whose output for the sample is at hand."""

    def __init__(self, logits: Tensor, mask_index: int) -> None:
        self.logits, self.mask_index, self.vocab_size = logits, mask_index, logits.shape[-1]

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        if state.shape != self.logits.shape[:2]:
            problem = "asks the denoiser about another state than the sample"
            raise UserError("policy", problem, "use decode, which has the denoiser")
        return self.logits
