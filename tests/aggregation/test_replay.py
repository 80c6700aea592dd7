"""A peer that missed some means fetches and applies them one by one, where that is no longer than
the model; and whoever made them can still show them."""

from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_events import (
    Apply,
    Download,
    Downloaded,
    Get,
    MeanFailed,
    MeanMade,
    PeerAction,
    PeerEvent,
    Say,
)
from atoll.aggregation.rendezvous_messages import Path, Step, Whence
from atoll.aggregation.seals import NAMES, RECENT, told, worth_keeping
from atoll.p2p.virtual import Swarm
from atoll.p2p.world import PeerModel, Weather
from tests.aggregation.test_seals import S, at, hear, steps_of, up


def run_of(*groups: str) -> tuple[Step, ...]:
    """Each with a mean of its own."""
    found: tuple[Step, ...] = ()
    for i, group in enumerate(groups):
        found += steps_of(group, base=found[-1].stand if found else S, digest=f"mean {i}")
    return found


def one_behind_by(steps: tuple[Step, ...], replay: int = 2) -> Rendezvous:
    b = up("b")
    b.replay = replay
    assert hear(b, "a", at(steps[-1])) == [Say("a", Whence(0.0))]
    return b


def came(machine: Rendezvous, digest: str) -> list[PeerAction]:
    made = machine.handle(MeanMade(machine.stand.chain, digest, None), 2.0)
    return [a for a in made if isinstance(a, Apply | Get | Download)]


def test_two_means_that_were_missed_are_applied_one_after_the_other() -> None:
    steps = run_of("abcd", "abd")
    b = one_behind_by(steps)
    assert hear(b, "a", Path(steps)) == [Get("s", "mean 0", ("a", "c", "d"))]
    assert hear(b, "a", at(steps[-1])) == []  # it is on its way
    assert came(b, "mean 0") == [Apply(steps[0].last.value, used=True)]
    assert b.stand == steps[0].stand
    assert hear(b, "a", at(steps[-1])) == [Get(b.stand.chain, "mean 1", ("a", "d"))]
    assert came(b, "mean 1") == [Apply(steps[1].last.value, used=True)]
    assert (b.stand, b.members) == (steps[1].stand, ("a", "b", "d"))
    assert b.recent == steps


def test_where_nobody_has_a_mean_any_more_the_model_is_downloaded() -> None:
    steps = run_of("abcd", "abcd")
    b = one_behind_by(steps)
    hear(b, "a", Path(steps))
    b.handle(MeanFailed("s", "nobody has it"), 1.5)
    assert hear(b, "a", at(steps[-1])) == [Download(steps[-1].stand, ("a",), "f")]


def test_where_the_way_is_not_known_or_its_answer_lost_the_model_is_downloaded() -> None:
    steps = run_of("abcd", "abcd")
    b = one_behind_by(steps)
    assert hear(b, "a", Path(steps[1:])) == [Download(steps[-1].stand, ("a",), "f")]
    b = one_behind_by(steps)
    assert hear(b, "a", at(steps[-1]), 1.0 + b.patience.reply - 0.1) == []
    last = hear(b, "a", at(steps[-1]), 1.0 + b.patience.reply)
    assert last == [Download(steps[-1].stand, ("a",), "f")]


def test_more_means_than_are_shorter_than_the_model_are_not_fetched() -> None:
    steps = run_of("abcd", "abcd", "abcd")
    b = up("b")
    assert hear(b, "a", at(steps[-1])) == [Download(steps[-1].stand, ("a",), "f")]
    assert hear(b, "c", at(steps[1])) == []  # nor others while that is on its way
    b = one_behind_by(steps, replay=3)
    assert hear(b, "a", Path(steps)) == [Get("s", "mean 0", ("a", "c", "d"))]


def test_after_a_download_it_has_none_of_the_means_before() -> None:
    steps = run_of(*["abcd"] * 5)
    b = up("b")
    b.held.add("mean 0")
    hear(b, "a", steps[0].last)
    assert b.recent == steps[:1]
    assert hear(b, "a", at(steps[-1]), 2.0) == [Download(steps[-1].stand, ("a",), "f")]
    b.handle(Downloaded(steps[-1].stand.chain), 3.0)
    assert (b.stand, b.recent) == (steps[-1].stand, ())


def test_whoever_made_the_last_means_shows_the_way_by_them_even_of_one_group() -> None:
    steps = run_of(*["abcd"] * 6)
    a = up("a")
    for step in steps:
        a.held.add(step.last.value.digest)
        hear(a, "c", step.last)
    assert a.recent == steps[-RECENT:]
    assert hear(a, "b", Whence(steps[2].stand.heavy)) == [Say("b", Path(steps[3:]))]
    assert hear(a, "b", Whence(0.0)) == [Say("b", Path((steps[0], *steps[-RECENT:])))]
    a.handle(MeanFailed("s", "too late"), 3.0)  # of an epoch that is over
    assert a.unheld == set()


def test_a_path_that_is_too_long_for_a_letter_leaves_the_last_means_out() -> None:
    group = "".join(chr(1000 + i) for i in range(NAMES // 3))
    steps = run_of(*[group] * 4)
    assert told(worth_keeping(steps), steps) == worth_keeping(steps) == (steps[0], steps[-1])


def test_who_was_cut_off_for_two_rounds_is_back_without_a_download() -> None:
    fetched: list[str] = []

    def listen(now: float, name: str, event: PeerEvent, actions: list[PeerAction]) -> None:
        fetched.extend(type(a).__name__ for a in actions if name == "d" and now > 9.2)

    peers = [PeerModel(name, pace=2.0) for name in "abcd"]
    weather = Weather(parted=((3.8, 9.2, frozenset("d")),))
    outcome = Swarm(peers, weather, seed=1, listen=listen).run(epochs=6)
    assert outcome.good
    missed = [e for e, (group, _) in outcome.commits.items() if "d" not in group]
    assert len(missed) == 2
    assert "Download" not in fetched
    assert fetched.count("Get") >= 2


def test_who_claims_one_model_after_the_other_fills_no_memory() -> None:
    b = up("b")
    for i in range(50):
        claimed = steps_of("d", "d", digest=f"false {i}")
        hear(b, "d", at(claimed[-1]))
        hear(b, "d", Path(claimed))
    assert not b.ways
    assert not b.proved


def test_what_is_claimed_of_a_way_that_does_not_begin_here_is_no_way() -> None:
    steps = run_of("abcd", "abcd")
    other = steps_of("abcd", "abcd", digest="other")
    b = one_behind_by(steps)
    b.proved[steps[-1].stand.chain] = (other[0], steps[-1])
    assert hear(b, "a", at(steps[-1]), 1.0 + b.patience.reply) == [
        Download(steps[-1].stand, ("a",), "f")
    ]
