"""Momenta: an outer optimizer's momentum beside one that is in every local step already.

FedAvg-M's and SCAFFOLD-M's local steps go (1 - beta) in the direction of all clients' last ones, so
a version's delta remembers the former ones by q = 1 - beta, whatever the server's step. Momentum m
on the server remembers them once more. Along a direction of which a version's fresh gradients take
away the share rho, x its distance to the optimum:

    d = q d + beta rho x;  v = m v + d;  x = x - lr v              (momentum)
                                         x = x - lr (d + m v)      (nesterov)

Two memories and a sum are three poles near 1: with m = 0.9 and beta = 0.1 this swings up from
lr = 0.03 on where rho = 1, while without a momentum of the server's (m = 0) it does from 38 on. So
beside such a local algorithm the server's momentum is 0.3, unless one gives another.
"""

from atoll.protocols import slots
from atoll.server import catalogue

BESIDE = 0.3  # momentum of the server that goes with one in the local steps
BETA = 0.1  # of the local algorithms, where none is given
LR = {"momentum": 1.0, "nesterov": 0.7}  # outer optimizers that have momentum, and their step


def suited(outer: str, algorithm: str) -> str:
    """`outer`, with a momentum that goes with the local algorithm's where none was given."""
    name, own, params = slots.split(outer)
    if own or name not in LR or "momentum" in params or not steered(algorithm):
        return outer
    return f"{outer}{',' if params else ':'}momentum={BESIDE}"


def remark(outer: str, algorithm: str) -> str:
    """What is to be said of the two at the start; empty: nothing."""
    if not steered(algorithm):
        return ""
    local, _, its = slots.split(algorithm)
    if suited(outer, algorithm) != outer:
        return (
            f"outer {outer} takes momentum={BESIDE} here: local algorithm {local} has momentum "
            "over rounds in every step, and two of them swing up"
        )
    name, own, params = slots.split(outer)
    if own or name not in LR:
        return ""
    lr, momentum = params.get("lr", LR[name]), params["momentum"]
    beta = its.get("beta", BETA)
    if isinstance(lr, str) or isinstance(momentum, str) or isinstance(beta, str):
        return ""  # refused where the parts are made
    most = largest_lr(momentum, beta, nesterov=name == "nesterov")
    if lr <= most:
        return ""
    return (
        f"outer {name} with lr={lr:g}, momentum={momentum:g} beside local algorithm {local} with "
        f"beta={beta:g}: two momenta may swing up from lr={most:.2g} on; give less of either"
    )


def steered(algorithm: str) -> bool:
    """Whether its local steps go in a direction that the server sends."""
    return "server_momentum" in catalogue.facts_of("local algorithm", algorithm).gives


def largest_lr(momentum: float, beta: float, *, nesterov: bool, rho: float = 1.0) -> float:
    """The step of the server up to which it is stable, by bisection."""
    low, high = 0.0, 4 / (beta * rho)
    for _ in range(50):
        middle = (low + high) / 2
        if stable(middle * beta * rho, momentum, 1 - beta, nesterov):
            low = middle
        else:
            high = middle
    return low


def stable(k: float, m: float, q: float, nesterov: bool) -> bool:
    """Whether all roots of the three-step recursion lie within the unit circle (Jury's test).

    (z - 1)(z - m)(z - q) + k z ((1 + m) z - m) for Nesterov, + k z^2 for momentum, k = lr beta rho.
    """
    a2, a1, a0 = -(1 + m + q), m + q + m * q, -m * q
    a2 += k * (1 + m) if nesterov else k
    a1 -= k * m if nesterov else 0.0
    at_one, at_minus_one = 1 + a2 + a1 + a0, 1 - a2 + a1 - a0
    return at_one > 0 and at_minus_one > 0 and abs(a1 - a0 * a2) < 1 - a0 * a0
