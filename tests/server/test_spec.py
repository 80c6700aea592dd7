"""What a run is: written once, read back, and not changed by another command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.protocols.errors import ServerError
from atoll.server.rules import Rules
from atoll.server.spec import FIXED, LOOSE, OPTIONS, RunSpec, begun, open_spec

SPEC = RunSpec("01HZX0000000000000000RVN00", strategy="fedavg:steps=5", local={"lr": 0.1})


def test_a_spec_is_read_as_it_was_written(tmp_path: Path, synced: list[str]) -> None:
    SPEC.write(tmp_path / "run.json")
    assert RunSpec.read(tmp_path / "run.json") == SPEC
    assert synced == [str(tmp_path / "run.json.tmp"), str(tmp_path)]  # no power cut leaves it empty
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"id": 5}', '{"id": "x", "colour": "red"}'])
def test_a_file_that_is_no_spec_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ServerError, match=r"run\.json") as refused:
        open_spec(tmp_path, SPEC)
    assert refused.value.code == "FL-S206"


def test_a_spec_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A full disk left an empty run.json behind, and no start ever succeeded again."""
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ServerError) as refused:
        SPEC.write(tmp_path / "run.json")
    assert refused.value.code == "FL-S203"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_new_folder_gets_the_run_that_was_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    assert open_spec(folder, SPEC, {"strategy"}) == SPEC
    assert RunSpec.read(folder / "run.json") == SPEC
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_existing_run_goes_on_whatever_the_defaults_are(tmp_path: Path) -> None:
    SPEC.write(tmp_path / "run.json")
    other = RunSpec("01HZX0000000000000000RVN01", strategy="fedbuff", seed=9, lease=3.0)
    assert open_spec(tmp_path, other) == SPEC


CHANGES: dict[str, object] = {
    "dp": "clip=1",
    "local_dp": "noise=1",
    "strategy": "fedbuff",
    "aggregator": "median",
    "outer": "adam",
    "algorithm": "fedprox:mu=1",
    "model": "cnn",
    "data": "mnist:x",
    "proxy": "digits",
    "trainer": "mine:Trainer",
    "buffers": "personal",
    "seed": 9,
    "codec_up": "bf16",
    "codec_down": "fp16",
    "local": {"lr": 0.2},
    "init": "/no/such/file",
}


@pytest.mark.parametrize("name", FIXED)
def test_what_the_run_is_cannot_be_changed(tmp_path: Path, name: str) -> None:
    SPEC.write(tmp_path / "run.json")
    changed = replace(SPEC, **{name: CHANGES[name]})  # type: ignore[arg-type]
    options = [o for o, fields in OPTIONS.items() if name in fields] or [name]
    for option in options:
        with pytest.raises(ServerError, match=name) as refused:
            open_spec(tmp_path, changed, {option})
        assert refused.value.code == "FL-S109"
        assert open_spec(tmp_path, SPEC, {option}) == SPEC  # the same once more is no change
    assert open_spec(tmp_path, changed, {"listen"}) == SPEC  # not spelled out: a default


def test_what_is_no_part_of_the_run_may_change_from_start_to_start(tmp_path: Path) -> None:
    """A lease given to a restarted server was passed over in silence."""
    SPEC.write(tmp_path / "run.json")
    other = replace(SPEC, lease=3.0, save_every=7, keep=2, name="again")
    for name in LOOSE:
        assert open_spec(tmp_path, other, {name}) == replace(SPEC, **{name: getattr(other, name)})
    assert open_spec(tmp_path, other) == SPEC


def test_a_client_hears_what_it_needs_and_no_more() -> None:
    told = json.loads(SPEC.for_clients())
    assert told["id"] == SPEC.id
    assert told["local"] == {"lr": 0.1}
    assert not {"strategy", "keep", "save_every", "lease"} & set(told)


def test_the_first_values_are_those_of_the_first_start(tmp_path: Path) -> None:
    """Another --init was not looked at, nor was one that is not there."""
    file, link, state = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "state"
    file.touch()
    link.symlink_to(file)
    wanted = begun(SPEC, Rules(), file)
    assert open_spec(state, wanted, {"init"}) == wanted
    for same in (file, link, tmp_path / "." / "state" / ".." / file.name):
        assert open_spec(state, begun(SPEC, Rules(), same), {"init"}) == wanted
    with pytest.raises(
        ServerError, match=r"holds a run with init=.*a\.safetensors.* not "
    ) as refused:
        open_spec(state, begun(SPEC, Rules(), tmp_path / "no"), {"init"})
    assert refused.value.code == "FL-S109"
    assert open_spec(state, begun(SPEC, Rules(), None)) == wanted  # not spelled out
