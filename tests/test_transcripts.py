"""Golden decisions: each file in transcripts/ is played, and must come out as it is written.

`pytest tests/test_transcripts.py --rewrite` writes them anew; commit a changed one when you can say
why it changed.
"""

from pathlib import Path

import pytest

from atoll.aggregation.strategy import Strategy
from atoll.protocols import slots, state
from atoll.server.replay import replay
from atoll.server.scenario import LINE, Scenario
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
