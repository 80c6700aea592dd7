"""Quorum: who of an epoch may decide it, so that two sides of a broken network never both do.

Dynamic linear voting (Jajodia and Mutchler 1990, https://doi.org/10.1145/78922.78926): more than
half of those who made the last commit, or just half with the first of them in order. Any two such
sets share a peer, so a run shrinks from many to two, one death at a time, and goes on.
"""

from collections.abc import Iterable, Sequence


def quorum(present: Iterable[str], members: Sequence[str], gone: Iterable[str] = ()) -> bool:
    """Whether `present` may decide for `members`.

    `gone`: those who said that they will never vote again. They count in neither half; whoever
    learns of them must know what they voted for last.
    """
    voters = sorted(set(members) - set(gone))
    here = [v for v in voters if v in set(present)]
    if 2 * len(here) == len(voters):
        return bool(here) and here[0] == voters[0]
    return 2 * len(here) > len(voters)
