"""Options: what a run is, as said on a command line; the same for a real and a simulated one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from atoll.protocols import console, places
from atoll.protocols.errors import UsageError

if TYPE_CHECKING:
    from atoll.server.rules import Rules
    from atoll.server.spec import RunSpec

F = TypeVar("F", bound=Callable[..., Any])

MIX = (
    click.option("--aggregator", default="mean", show_default=True,
                 help="mean, median, krum:f=0.2, ...; or MODULE:OBJECT. "
                 "See `fl-server aggregators`."),
    click.option("--outer", default="",
                 help="sgd, momentum, nesterov, adam, yogi, adagrad, e.g. nesterov:lr=0.7. "
                 "See `fl-server outers`.  [default: sgd; of diloco nesterov]"),
    click.option("--local", "algorithm", default="plain", show_default=True,
                 help="Local algorithm: plain, fedprox:mu=0.1, scaffold-m, ... "
                 "See `fl-server locals`."),
    click.option("--codec", default="fp32", show_default=True,
                 help="bf16, int8, topk:0.01+ef; or up=topk:0.01+ef/int8,down=int8. See "
                 "`fl-server codecs`."),
    click.option("--lr", type=float, default=None, help="Local learning rate."),
    click.option("--trainer", default="", help="Your own Trainer as MODULE:OBJECT."),
)  # fmt: skip

PRIVATE = (
    click.option("--dp", default="", metavar="SPEC", callback=console.not_empty,
                 help="Differential privacy by the server: clip=0.3,noise=1; "
                 "see docs/privacy.md."),
    click.option("--local-dp", default="", metavar="SPEC", callback=console.not_empty,
                 help="Noise on every client, for a server nobody trusts: clip=0.3,noise=2."),
    click.option("--max-epsilon", type=float, default=None,
                 help="End before --dp or --local-dp has cost any client more."),
)  # fmt: skip


def run_options(command: F) -> F:
    """The options that say what a run is; they become a RunSpec and its Rules."""
    options = [
        click.option("--strategy", default="fedcompass", show_default=True,
                     help="fedavg, fedbuff, fedasync, fedcompass, diloco, with parameters as "
                     "fedavg:steps=50,cohort=8; or MODULE:OBJECT. See `fl-server strategies`."),
        *MIX,
        click.option("--proxy", default="", metavar="DATA",
                     help="Labelled examples of the server's own that an aggregator learns by "
                     "(fedlaw): digits, npz:FILE,take=200, ..."),
        click.option("--model", default="mlp", show_default=True,
                     help="mlp, cnn, resnet18, charlm, linear, or MODULE:OBJECT."),
        click.option("--data", default="digits", show_default=True,
                     help="digits, mnist:DIR, cifar10:DIR, text:FILE, csv:FILE, npz:FILE, "
                     "MODULE:OBJECT; none: the clients evaluate."),
        click.option("--batch", type=int, default=None, help="Local batch size."),
        click.option("--local-optimizer", default=None,
                     type=click.Choice(["sgd", "adam", "adamw"]), help="Of the local steps."),
        click.option("--local-momentum", type=float, default=None, help="Of local SGD."),
        click.option("--clip", type=float, default=None, help="Largest local gradient norm."),
        click.option("--buffers", default="weighted_mean", show_default=True,
                     type=click.Choice(["weighted_mean", "keep_server", "personal"]),
                     help="What becomes of BatchNorm statistics."),
        *PRIVATE,
        click.option("--seed", default=0, show_default=True,
                     help="Of the model's start, the split of the data and the batches."),
        click.option("--target-accuracy", type=float, default=None, help="Stop when reached."),
        click.option("--versions", type=int, default=None, help="Stop after so many versions."),
        click.option("--updates", type=int, default=None, help="Stop after so many updates."),
        click.option("--steps", type=int, default=None, help="Stop after so many local steps."),
        click.option("--seconds", type=float, default=None, help="Stop after so long."),
        click.option("--patience", type=int, default=None,
                     help="Stop after so many evaluations without improvement."),
    ]  # fmt: skip
    return _with(options, command)


def mix_options(command: F) -> F:
    """The parts beside the strategy, by which the clients train and the server merges."""
    return _with(MIX, command)


def private_options(command: F) -> F:
    """Those of noise alone; `private` reads them."""
    return _with(PRIVATE, command)


def _with(options: Sequence[Callable[[F], F]], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def rules_of(given: dict[str, Any]) -> "Rules":
    from atoll.server.rules import Rules

    limits = {k: given[k] for k in ("versions", "updates", "steps", "seconds", "patience")}
    return Rules(target=given["target_accuracy"], **limits)


def spec_of(given: dict[str, Any], **more: Any) -> "RunSpec":
    from atoll.protocols.codecspec import parse_ways
    from atoll.protocols.ids import ulid
    from atoll.server.presets import preset_of
    from atoll.server.spec import RunSpec

    up, down = parse_ways(given["codec"]).texts
    names = {
        "lr": "lr",
        "batch": "batch",
        "local_optimizer": "optimizer",
        "local_momentum": "momentum",
        "clip": "clip",
    }
    preset = preset_of(given["strategy"])
    local = {**preset.local, **{names[k]: given[k] for k in names if given[k] is not None}}
    check_numbers({**given, **more})
    dp, local_dp = private(given)
    kept = ("strategy", "aggregator", "algorithm", "model", "trainer", "proxy", "buffers")
    same = {k: given[k] for k in (*kept, "seed")}
    same["outer"] = given["outer"] or preset.outer
    same["data"] = data_of(given["data"])
    return RunSpec(
        ulid(), codec_up=up, codec_down=down, local=local, dp=dp, local_dp=local_dp, **same, **more
    )


def private(given: Mapping[str, Any]) -> tuple[str, str]:
    """(dp, local dp), `--max-epsilon` a limit of whichever there is. UsageError FL-S108."""
    dp, local_dp, most = given["dp"], given["local_dp"], given["max_epsilon"]
    if most is None:
        return dp, local_dp
    if not dp and not local_dp:
        raise UsageError(
            "FL-S108", f"--max-epsilon {most:g} without noise", "add --dp clip=0.3,noise=1"
        )
    limit = f",epsilon={most!r}"
    return dp + limit * bool(dp), local_dp + limit * bool(local_dp)


def check_numbers(given: Mapping[str, Any]) -> None:
    """What nobody can mean is refused here, before anything starts. UsageError FL-S102."""

    def finite(value: float) -> bool:
        return 0 < value < float("inf")

    limits: dict[str, tuple[Callable[[float], bool], str]] = {  # option: (holds, what to give)
        "lr": (finite, "a number above 0"),
        "batch": (lambda v: v >= 1, "at least 1"),
        "local_momentum": (lambda v: 0 <= v < 1, "a number from 0 to below 1"),
        "clip": (finite, "a number above 0"),
        "max_epsilon": (finite, "a number above 0"),
        "lease": (finite, "seconds above 0"),
        "save_every": (lambda v: v >= 1, "at least 1"),
        "keep": (lambda v: v >= 1, "at least 1"),
        "seed": (lambda v: 0 <= v < 1 << 63, "a whole number from 0"),
        "until": (finite, "virtual seconds above 0"),
        "threads": (lambda v: 1 <= v <= 1024, "from 1 to 1024"),
        "evaluate_every": (lambda v: v >= 1, "at least 1"),
        "most_examples": (lambda v: v >= 0, "at least 1, or 0 for no bound"),
    }
    for name, (holds, want) in limits.items():
        value = given.get(name)
        if value is not None and not holds(value):
            option = {"most_examples": "max_examples"}.get(name, name).replace("_", "-")
            raise UsageError("FL-S102", f"--{option} {value}", f"give {want}")


WRITTEN = ("model.safetensors", "history.jsonl", "timeline.png", "accuracy.png", "shares.png")


def make_folder(out: Path) -> None:
    """For what a demo or a simulation leaves. UsageError FL-S108 where it, or that, cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            "FL-S108", f"--out {out}: {error.strerror}", "give a folder that can be made"
        ) from error
    for name in WRITTEN:
        places.target(out / name)  # known now, not when the run is over


def data_of(text: str) -> str:
    """`none` is no data, which a RunSpec calls ''."""
    return "" if text == "none" else text


def spelled_out() -> set[str]:
    """The options that the user gave, as opposed to defaults."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {name for name in context.params if context.get_parameter_source(name) != default}
