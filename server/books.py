"""Books: what a run's privacy has cost so far, and how long an update may be. Kept in each version.

A version holds the books that were closed with it, so what was spent is known wherever the model
is, and a version made again after a crash is charged once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Books:
    """Never shown to clients: who took part how often is nobody else's business."""

    clip: float  # length (L2) to which the next updates are cut
    spent: Mapping[str, float] = field(default_factory=dict)  # client -> sum of mu^2, see gaussian
    rounds: int = 0  # releases for which all clients could have been drawn
