"""A policy that was learned for a range of step prices, as the points of one curve."""

from orderppl import Policy
from orderppl.evaluation import Arm
from orderppl.policies import AtPrice, PriceRange

COUNT = 7  # prices at which it is played


def priced_arms(name: str, policy: Policy, prices: PriceRange, steps: int, seed: int) -> list[Arm]:
    """The policy at prices across its range.

    Args:
        name: what the arms are called; their family is `learned`.
        policy: what was learned, see `AtPrice`.
        prices: the range.
        steps: step budget T.
        seed: of the training.
    """
    arms = []
    for price in prices.grid(COUNT):
        label, setting = f"{name} price={price:.3g} #{seed}", {"price": price}
        played = AtPrice(policy, price)
        arms.append(Arm(label, played, steps, family="learned", mode=True, training_seed=seed, setting=setting))
    return arms
