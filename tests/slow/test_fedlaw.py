"""FedLAW with real processes: a demo reaches its target, bad proxy data end a start at once."""

from typing import TYPE_CHECKING

import pytest

from atoll.server.history import History

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow


def test_the_demo_reaches_its_target(federation: "Federation") -> None:
    """FedCompass merges singles too, which are not learned on; its groups are."""
    demo = federation.command(
        "demo", "fl-server", "demo", "--strategy", "fedcompass", "--aggregator", "fedlaw",
        "--out", "made", "--json",
    )  # fmt: skip
    told = demo.data(300)
    assert told["reached"]
    assert told["accuracy"] >= 0.95
    folder = demo.out.parent / "made"
    assert (folder / "shares.png").stat().st_size > 1000
    history = History.read(folder / "history.jsonl")
    assert history.taken, "nothing was learned"
    for taken in history.taken:
        assert sum(share for share, _ in taken.shares.values()) == pytest.approx(1)
        assert taken.gamma is not None
    merged = [row["stats"] for row in history.rows if row["kind"] == "merged"]
    assert all("fallback" in stats or "proxy_loss" in stats for stats in merged)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--aggregator", "fedlaw"), "FL-S104"),
        (("--aggregator", "fedlaw:no_proxy=validators"), "FL-S104"),
        (("--proxy", "digits"), "FL-S104"),
        (("--aggregator", "fedlaw", "--proxy", "digits:take=5"), "FL-D107"),
        (("--aggregator", "fedlaw", "--proxy", "synthetic"), "FL-D106"),
    ],
)
def test_a_server_that_cannot_learn_does_not_start(
    federation: "Federation", options: tuple[str, ...], code: str
) -> None:
    start = federation.command(
        "start", "fl-server", "start", "--listen", "127.0.0.1:0", "--state", "state", "--json",
        *options,
    )  # fmt: skip
    assert start.error(60) == code
    assert not (start.out.parent / "state" / "run.json").exists()
