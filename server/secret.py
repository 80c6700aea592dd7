"""Secret: the 32 bytes of a run from which its noise comes, in a file that nobody else may read.

Who has it and the versions can take the noise off again, and who merges other updates with it tells
the difference of the two. So it is never in what clients see, never in `run.json`, and a state
directory with noise is never continued in two places.
"""

import secrets
from pathlib import Path

from atoll.aggregation.noise import KEY, derived
from atoll.aggregation.strategy import Strategy
from atoll.protocols.durable import put_private
from atoll.protocols.errors import ServerError
from atoll.server.accountant import Sampling
from atoll.server.dp import central_dp
from atoll.server.privacy import Privacy
from atoll.server.spec import RunSpec

FILE = "privacy.key"


def key_of(folder: Path, begun: bool) -> bytes:
    """The run's secret, made where it has not begun. ServerError FL-S206 where it is gone."""
    path = folder / FILE
    try:
        if begun or path.exists():
            found = path.read_bytes()
            if len(found) != KEY:
                raise OSError(f"{len(found)} bytes, not {KEY}")
            return found
        made = secrets.token_bytes(KEY)
        put_private(path, made)
    except OSError as error:
        raise ServerError(
            "FL-S206", f"the run's secret {path} cannot be read or made: {error}",
            "restore it: without it, a version made again would get other noise",
        ) from error  # fmt: skip
    return made


def privacy_of(spec: RunSpec, strategy: Strategy, key: bytes) -> Privacy:
    """What `spec.dp` asks for. Whom the strategy draws becomes a secret, too."""
    drawn = sampling_of(strategy)
    if drawn is not None:
        strategy.secret = derived(key, "drawn").hex()  # type: ignore[attr-defined]
    return Privacy(central_dp(spec.dp), key, drawn)


def sampling_of(strategy: Strategy) -> Sampling | None:
    """How it draws clients in secret; None where it does not, and nothing is hidden by chance."""
    found = getattr(strategy, "sampling", None)
    return None if found is None else Sampling(*found)
