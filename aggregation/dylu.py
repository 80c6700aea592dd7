"""DyLU: who is slower makes fewer local steps in a round, so that all are done at about one time.

Liu et al. 2024, https://arxiv.org/abs/2401.09135: H_i = H * v_i / max v. Shares are counted in
eighths, so that noise in a measured speed changes nothing; the same rule for a server's clients and
for peers.
"""

import math

EIGHTHS = 8
LEAST = 5  # local steps below which a round is not worth its exchange


def share(speed: float, reference: float) -> float:
    """Of a whole round's work, 1/8 to 1, that a machine of `speed` does; `reference` does all of
    it. In steps a second; `speed` 0 is one that was not measured. Nobody gains by a claim: more
    than all does not exist."""
    assert speed >= 0, f"speed {speed}"
    assert reference > 0, f"reference {reference}"
    return max(1, round(EIGHTHS * min(speed / reference, 1.0))) / EIGHTHS


def local_steps(steps: int, share: float, least: int = LEAST) -> int:
    """Of `steps`, those of who does `share` of the work; `least` of them, if there are so many."""
    return max(min(least, steps), math.floor(steps * share))
