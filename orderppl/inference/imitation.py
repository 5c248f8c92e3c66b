"""Learning what a teacher reveals: the warm start of a fit."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from orderppl.distributions import OrderDistribution
from orderppl.errors import UserError
from orderppl.inference.objective import Objective
from orderppl.inference.programs import Program, make_local
from orderppl.unmasking.trajectory import steps_used


class Imitation(Objective, Trace_ELBO):
    """Maximum likelihood of a teacher's orders, under the prior of the model and under the guide.

        objective = E_teacher[ log p(r) + log q(r | x) ],      r ~ teacher(r | x)

    Each of the two terms is there if its program has something to learn besides the denoiser; a tied pair, whose
    programs learn the same parameters, counts once, by its guide. For policies that decide position by position this is
    the binary cross-entropy of their decisions to the teacher's sets, at the states that the teacher meets. The
    teacher learns nothing, so the gradient is that of supervised learning: no score function, no baseline. What the
    tokens are worth is not looked at: `log p(x | r)` is left out, and a fit with a bound is to follow. Freeze the
    denoiser meanwhile, or the policies that read it will move it to where the teacher is easy to follow.

    Args:
        teacher: program that samples `reveal_step`, called as model and guide are, such as `PolicyGuide` with any
            heuristic. A `Smoothed` one also shows what to do after a slip.
        num_particles: orders drawn per sequence; a point mass needs one.

    Attributes:
        metrics: detached 0-dim tensors of the last call, per sequence: `log_prior`, `log_guide` (nats, where they are
            learned) and `steps`, the mean number of steps the teacher used.

    Raises:
        UserError: when called, for a teacher without the site `reveal_step`, a pair without anything to learn, or a
            student that gives orders of the teacher probability 0 (of the first batch; later, the loss is infinite).
    """

    def __init__(self, teacher: Program, num_particles: int = 1) -> None:
        super().__init__(num_particles)
        del self.kl_weight  # a setting that this objective does not have
        make_local(teacher)
        self.teacher = teacher
        self._checked = False

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        order = self._draw(args, kwargs)  # [K, B, S], or [B, S] for one particle
        terms = {
            name: _log_density(program, order, args, kwargs) / self.num_particles
            for name, program in _students(model, guide).items()
        }
        if not self._checked:  # once: the host would have to wait for the device
            self._checked = True
            for name, log_density in terms.items():
                if not bool(log_density.isfinite().all()):
                    problem = f"the {name} gives orders that the teacher draws probability 0"
                    remedy = "choose a teacher that reveals something at every step, in the sets that the student can"
                    raise UserError("teacher", problem, f"{remedy} take, or another student")
        value = torch.stack([log_density.sum() for log_density in terms.values()]).sum()
        sequences = order.shape[-2]
        self.metrics = {f"log_{name}": term.detach().sum() / sequences for name, term in terms.items()}
        self.metrics["steps"] = steps_used(order).float().mean()
        return value, value

    def _draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with torch.no_grad(), poutine.trace() as tracer:
            if self.num_particles == 1:
                self.teacher(*args, **kwargs)
            else:
                with pyro.plate("particles", self.num_particles, dim=-2):
                    self.teacher(*args, **kwargs)
        site = tracer.trace.nodes.get("reveal_step")
        if site is None or not isinstance(site["fn"], OrderDistribution):
            problem = "draws no order at a site `reveal_step`"
            raise UserError("teacher", problem, "give a guide such as PolicyGuide")
        order: Tensor = site["value"]
        return order


def _students(model: Any, guide: Any) -> dict[str, Program]:
    """The programs that learn, by what they give a density of."""
    learned = {name: _own_parameters(program) for name, program in {"prior": model, "guide": guide}.items()}
    if not learned["prior"] and not learned["guide"]:
        raise UserError("teacher", "neither prior nor guide has parameters to learn", "choose one that has")
    if learned["prior"] == learned["guide"]:
        return {"guide": guide}
    return {name: program for name, program in (("prior", model), ("guide", guide)) if learned[name]}


def _own_parameters(program: Any) -> set[nn.Parameter]:
    """Parameters that require a gradient and are not the denoiser's."""
    if not isinstance(program, nn.Module):
        return set()
    denoiser = getattr(program, "denoiser", None)
    shared = set(denoiser.parameters()) if isinstance(denoiser, nn.Module) else set()
    return {parameter for parameter in program.parameters() if parameter.requires_grad} - shared


def _log_density(program: Program, order: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Log-density of orders under the site `reveal_step` of a program, float [*]."""
    with poutine.trace() as tracer, poutine.condition(data={"reveal_step": order}):
        program(*args, **kwargs)
    tracer.trace.compute_log_prob(lambda name, site: name == "reveal_step")
    log_density: Tensor = tracer.trace.nodes["reveal_step"]["log_prob"]
    return log_density
