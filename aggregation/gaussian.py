"""What Gaussian noise protects: epsilon of any number of releases without sampling, exactly.

A release that one client can move by at most S (in L2), with noise of standard deviation sigma,
costs mu = S / sigma. Costs add up in squares, whatever was learned in between, and the sum is again
that of one Gaussian (Dong, Roth and Su 2019, https://arxiv.org/abs/1905.02383); its epsilon is a
closed form (Balle and Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8).
"""

import math

from atoll.aggregation.checks import within
from atoll.protocols.errors import UsageError

# Far beyond what helps anybody; squares and products are floats still.
CLIPS = 1e-12, 1e12
NOISES = 1e-6, 1e6  # z
ROUNDS = 60  # of bisection: to the last bit of a float


def delta_of(epsilon: float, mu: float) -> float:
    """The least delta for which a total cost of `mu` is (epsilon, delta)-private."""
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    return max(0.0, _upper(near) - math.exp(epsilon + _log_upper(far)))


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon at `delta`. 0 where nothing was released, inf where without noise."""
    check_delta(delta)
    if delta_of(0.0, mu) <= delta:
        return 0.0
    if math.isinf(mu):
        return math.inf
    low, high = 0.0, 1.0
    while delta_of(high, mu) > delta:
        low, high = high, 2 * high
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle, mu) <= delta else (middle, high)
    return high


def mu_of(epsilon: float, delta: float) -> float:
    """The greatest cost that is (epsilon, delta)-private."""
    check_delta(delta)
    high = 1.0
    while delta_of(epsilon, high) <= delta:
        high *= 2
    low = 0.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(epsilon, middle) <= delta else (low, middle)
    return low


def check_delta(delta: float) -> None:
    """UsageError FL-S102 where it is no probability that could be meant."""
    if not 0 < delta < 1:
        raise UsageError("FL-S102", f"delta={delta}", "choose a number between 0 and 1, e.g. 1e-5")


def check_noise(clip: float, **noise: float | None) -> None:
    """UsageError FL-S102 where a length or a deviation is none that could be meant. 0: no noise."""
    least, most = NOISES
    within(*CLIPS, clip=clip)
    for name, z in noise.items():
        if z is not None and z != 0 and not least <= z <= most:
            hint = f"choose from {least:g} to {most:g}, or 0 for no noise"
            raise UsageError("FL-S102", f"{name}={z}", hint)


def _upper(x: float) -> float:
    """The probability that a standard normal value is above x."""
    return math.erfc(x / math.sqrt(2)) / 2


def _log_upper(x: float) -> float:
    """Its logarithm, also where it is too small for a float."""
    if x < 30:
        return math.log(_upper(x))
    square = x * x  # the first terms of the asymptotic series; the next one is below 1e-8
    series = 1 - 1 / square + 3 / square**2 - 15 / square**3
    return -square / 2 - math.log(x * math.sqrt(2 * math.pi)) + math.log(series)
