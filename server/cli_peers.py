"""`fl-server start --peer INVITE`: a run whose server is one of the peers of a run without one."""

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.protocols.errors import UsageError

if TYPE_CHECKING:
    from atoll.p2p.behalf import Behalf
    from atoll.p2p.manifest import Manifest
    from atoll.server.spec import RunSpec

TOLD = (
    "lr",
    "batch",
    "optimizer",
    "weight_decay",
    "clip",
    "keep_optimizer_state",
    "schedule",
    "warm",
)


def joined(invite: str, state: Path, name: str) -> "tuple[Behalf, Manifest]":
    """This machine as one of the peers, its memory beside `state`. PeerError where it cannot be."""
    from atoll.p2p.behalf import Behalf
    from atoll.p2p.invite import read

    behalf = Behalf(state.with_name(f"{state.name}-peer"), read(invite), name=name)
    return behalf, behalf.start()


def like_peers(spec: "RunSpec", manifest: "Manifest", given: Collection[str]) -> "RunSpec":
    """The run as its peers train it: model, data, local training and outer step are theirs.

    `given`: what the user has said of `spec`. UsageError FL-S104 where that does not go with it.
    """
    from atoll.p2p.work import local_of

    for name in ("model", "data", "outer", "seed"):
        asked, theirs = getattr(spec, name), getattr(manifest, name)
        if name in given and asked != theirs:
            said = "none" if asked == "" else asked  # as it is typed
            raise UsageError(
                "FL-S104", f"--{name} {said}, but the peers of this run have {theirs}",
                "leave it out: what is trained is said once, by the run's founder",
            )  # fmt: skip
    local = asdict(local_of(manifest))
    made = replace(
        spec,
        strategy=spec.strategy if "strategy" in given else f"diloco:steps={manifest.local_steps}",
        model=manifest.model,
        data=manifest.data,
        seed=manifest.seed,
        outer=manifest.outer,
        local={key: local[key] for key in TOLD if local[key] is not None},
    )
    _check(made)
    return made


def _check(spec: "RunSpec") -> None:
    from atoll.server.check import of_part, strategy_of

    wrong = {
        f"--aggregator {spec.aggregator}": spec.aggregator != "mean",
        f"--local {spec.algorithm}": spec.algorithm != "plain",
        "--dp": bool(spec.dp),
        f"--save-every {spec.save_every}": spec.save_every != 1,
        f"--strategy {spec.strategy}, which has no rounds": "rounds"
        not in of_part("strategy", spec.strategy, strategy_of(spec)).gives,
    }
    for what, bad in wrong.items():
        if bad:
            raise UsageError(
                "FL-S104", f"--peer with {what}", "leave it out: the mean is made with the peers"
            )
