"""Orders that nobody has to learn: what a step reveals is spread out."""

from itertools import product
from math import gcd

from orderppl import Denoiser, evaluate
from orderppl.data import Examples
from orderppl.evaluation import Arm, summary
from orderppl.policies import Dilated, FixedOrder

SPACED = [(0, 3, 1, 3, 2, 3), (3, 0, 3, 1, 3, 2)]  # of four steps, with longer periods than all that are tried


def spaced_orders(steps: int) -> list[Arm]:
    """The dilated schedule, every pattern of at most four positions that uses all steps, and strides of more steps.

    A stride k reveals position i at step k i mod T.
    """
    patterns = [p for size in range(2, 5) for p in product(range(steps), repeat=size) if len(set(p)) == steps]
    strides = [k for k in range(2, steps) if gcd(k, steps) == 1]
    patterns += [tuple(k * i % steps for i in range(steps)) for k in strides if steps > 4]
    patterns += SPACED if steps == 4 else []
    arms = [Arm(f"periodic {p}", FixedOrder(p, periodic=True), steps, family="periodic") for p in patterns]
    return [*arms, Arm("dilated", Dilated(), steps)]


def best_of(arms: list[Arm], denoiser: Denoiser, rows: Examples) -> Arm:
    """The arm with the best likelihood."""
    means = summary(evaluate(arms, denoiser, rows), ["path_nats"]).set_index("arm")["value"]
    return next(arm for arm in arms if arm.name == means.idxmin())
