"""Golden decisions: each file in transcripts/ is played, and must come out as it is written.

`pytest tests/test_transcripts.py --rewrite` writes them anew; commit a changed one when you can say
why it changed.
"""

from pathlib import Path

import pytest

from atoll.aggregation.strategy import Strategy
from atoll.protocols import slots, state
from atoll.protocols.events import (
    Aggregate,
    Ask,
    ClientInfo,
    ClientJoined,
    Discard,
    Evaluated,
    Merged,
)
from atoll.server.replay import replay
from atoll.server.scenario import LINE, Scenario, Transcript
from atoll.server.spec import STRATEGIES

FOLDER = Path(__file__).parent / "transcripts"
FILES = sorted(FOLDER.glob("*.txt"))


def read(file: Path) -> tuple[str, str]:
    head, line, golden = file.read_text().partition(LINE)
    assert line, f"{file.name} has no line of ----"
    return head, golden


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_scenario_is_decided_as_written(file: Path, request: pytest.FixtureRequest) -> None:
    head, golden = read(file)
    played = Scenario.parse(head).play().text
    if request.config.getoption("--rewrite"):
        file.write_text(head + LINE + played)
        return
    assert played.splitlines() == golden.splitlines()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_strategy_dumped_and_loaded_before_every_event_decides_the_same(file: Path) -> None:
    scenario = Scenario.parse(read(file)[0])
    made = slots.resolve("strategy", scenario.strategy, STRATEGIES)
    assert isinstance(made, Strategy)
    for heard in scenario.play().heard:
        made = state.loads(type(made), state.dumps(made))
        assert replay(made, [heard]) == 1


def test_a_line_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="'clients a'"):
        Scenario.parse("strategy fedavg\nclients a\n")


def test_a_transcript_says_everything_that_can_happen() -> None:
    transcript = Transcript()
    transcript.hear(1.0, ClientJoined("a", ClientInfo(3, 0.5)), [Ask("a", "send")])
    transcript.hear(2.0, Evaluated(1, {"accuracy": 0.5}), [Discard("o0.0", "no")])
    transcript.hear(3.0, Merged(1, ("o1.0",)), [Aggregate((("o1.0", 0.5),), outer=False)])
    transcript.hear(4.0, Merged(2, ("o1.0",)), [])
    assert transcript.text.splitlines() == [
        "   1.00  a joins with 3 examples, 0.5 s a step",
        "         ask a to send",
        "   2.00  v1 evaluated: {'accuracy': 0.5}",
        "         discard o0.0: no",
        "   3.00  v1 exists",
        "         aggregate o1.0:0.5 -> v1, past the outer optimizer",
    ]
