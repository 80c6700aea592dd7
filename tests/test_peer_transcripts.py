"""Golden decisions of peers: each file in transcripts/peers/ must come out as it is written.

`pytest tests/test_peer_transcripts.py --rewrite` writes them anew; commit a changed one when you
can say why it changed.
"""

from pathlib import Path

import pytest

from atoll.p2p.scenario import LINE, Scenario

FILES = sorted((Path(__file__).parent / "transcripts" / "peers").glob("*.txt"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_swarm_decides_as_written(file: Path, request: pytest.FixtureRequest) -> None:
    head, line, golden = file.read_text().partition(LINE)
    assert line, f"{file.name} has no line of ----"
    outcome, played = Scenario.parse(head).play()
    assert outcome.good
    if request.config.getoption("--rewrite"):
        file.write_text(head + LINE + played)
        return
    assert played.splitlines() == golden.splitlines()


def test_a_line_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="'peer a'"):
        Scenario.parse("peer a\n")
