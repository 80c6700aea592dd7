"""The table: rows and versions in step whatever is killed or damaged, and nobody sees another's."""

import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.aggregation.control import Control
from atoll.aggregation.dynamic import Dynamic
from atoll.protocols.blobs import CHUNK
from atoll.protocols.codecs import Decoder
from atoll.protocols.errors import RemoteError, ServerError
from atoll.server.passes import Crew, NotFiniteError
from atoll.server.rewrite import rewrite
from atoll.server.table import Key, Table, table_of

COUNT = 1000
Numbers = dict[str, float]


@pytest.fixture(params=["memory", "disk"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    return Table("variate", COUNT, tmp_path / "rows" if request.param == "disk" else None)


def values(seed: int, count: int = COUNT) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def sent(change: Tensor) -> Decoder:
    return lambda lo, hi, out: out[: hi - lo].copy_(change[lo:hi])


def merged(
    table: Table,
    former: Mapping[str, float],
    changes: Mapping[str, Tensor],
    tile: int = 64,
    threads: int = 1,
) -> Numbers:
    """Numbers of the version whose merge takes in these changes."""
    crew = Crew(threads)
    try:
        said = rewrite(table, crew, former, ((c, sent(t)) for c, t in changes.items()), tile)
    finally:
        crew.close()
    commits = {f"commits/{c}": former.get(f"commits/{c}", 0.0) + 1 for c in changes}
    return {**former, **commits, **said}


def held(table: Table, numbers: Numbers, client: str) -> Tensor:
    row = table.row(numbers, client)
    assert row is not None
    return row


def files(table: Table) -> list[str]:
    assert table.folder is not None
    return sorted(p.name for p in table.folder.iterdir())


def test_a_row_is_the_sum_of_its_changes_and_each_version_has_its_own(table: Table) -> None:
    first = merged(table, {}, {"a": values(1), "b": values(2)})
    second = merged(table, first, {"a": values(3)})
    assert table.row({}, "a") is None
    assert torch.equal(held(table, first, "a"), values(1))
    assert torch.equal(held(table, second, "a"), values(3) + values(1))
    assert torch.equal(held(table, second, "b"), values(2))


def test_what_travels_is_the_row_and_zeros_do_not(table: Table) -> None:
    numbers = merged(table, {}, {"a": values(1)})
    assert table.blob(numbers, "b") is None
    blob = table.blob(numbers, "a")
    assert blob is not None
    assert bytes(blob.view) == values(1).numpy().tobytes()
    assert (blob.info.id, blob.info.size) == ("own/a/1", 4 * COUNT)
    assert [s.group for s in blob.info.sections] == ["extra:variate"]


def test_nobody_is_given_anothers_row(table: Table) -> None:
    numbers = merged(table, {}, {"a": values(1), "b": values(2)})
    blob = table.blob(numbers, "a")
    assert blob is not None
    assert table.find("a", blob.info.id) == blob
    assert table.find("b", blob.info.id) is None
    assert table.find("c", blob.info.id) is None
    assert table.find("a", "own/a/2") is None
    assert table.find("a", "v1/fp32") is None


@pytest.mark.parametrize("how", [(1 << 20, 1), (333, 1), (7, 3)])
def test_tiles_and_threads_change_no_bit(tmp_path: Path, how: tuple[int, int]) -> None:
    table = Table("variate", COUNT, tmp_path)
    tile, threads = how
    first = merged(table, {}, {"a": values(1)}, tile, threads)
    second = merged(table, first, {"a": values(2)}, tile, threads)
    assert torch.equal(held(table, second, "a"), values(1) + values(2))
    assert second["row/a"] == merged(table, first, {"a": values(2)})["row/a"]


def test_a_merge_that_fails_leaves_no_row(table: Table) -> None:
    numbers = merged(table, {}, {"a": values(1)})
    wrong = values(3)
    wrong[700] = torch.inf
    with pytest.raises(NotFiniteError):
        merged(table, numbers, {"a": values(2), "b": wrong})
    assert kept(table, a=2, b=1) == ["a.1"]
    if table.folder is not None:
        assert files(table) == ["a.1"]
    again = merged(table, numbers, {"a": values(4)})
    assert torch.equal(held(table, again, "a"), values(4) + values(1))


def test_a_full_disk_is_told_and_leaves_no_row(tmp_path: Path) -> None:
    """Files may not grow past a chunk: the kernel refuses as a full disk would."""
    table = Table("variate", CHUNK, tmp_path)  # of four chunks
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK, hard))
    try:
        with pytest.raises(ServerError, match=r"FL-S203.*a\.1\.part cannot be written"):
            merged(table, {}, {"a": values(1, CHUNK)}, CHUNK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [name for name in files(table) if not name.endswith(".part")] == []
    numbers = merged(table, {}, {"a": values(1, CHUNK)}, CHUNK)
    assert files(table) == ["a.1"]
    assert torch.equal(held(table, numbers, "a"), values(1, CHUNK))


# ---- another life ------------------------------------------------------------------------------


def test_a_process_that_died_leaves_rows_and_nothing_half_written(tmp_path: Path) -> None:
    numbers = merged(Table("variate", COUNT, tmp_path), {}, {"a": values(1)})
    (tmp_path / "a.2.part").write_bytes(b"half")
    (tmp_path / "README").write_text("somebody's")
    again = Table("variate", COUNT, tmp_path)
    assert files(again) == ["README", "a.1"]
    again.check(numbers)
    assert torch.equal(held(again, numbers, "a"), values(1))


@pytest.mark.parametrize("name", ["a.1", "a.part", "x-_.9"])
def test_every_name_that_a_client_may_have_is_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    """`a.1` changed once is not `a` changed 11 times, nor is `a.part` a row half written."""
    table = Table("variate", COUNT, tmp_path)
    numbers = merged(table, {}, {name: values(1), "a": values(2)})
    again = Table("variate", COUNT, tmp_path)
    again.check(numbers)
    assert torch.equal(held(again, numbers, name), values(1))
    assert torch.equal(held(again, numbers, "a"), values(2))
    again.roll_back({})
    assert files(again) == []


def test_no_other_name_becomes_a_path(tmp_path: Path) -> None:
    for name in ("../x", "", ".", "a/b", "A", "\0"):
        with pytest.raises(AssertionError, match="path"):
            Table("variate", COUNT, tmp_path / "rows").begin(Key(name, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x7f"), "not what was written"),
        (lambda p: p.write_bytes(p.read_bytes()[:-4]), "3996 bytes, not 4000"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.unlink(), "No such file"),
    ],
    ids=["bit", "short", "empty", "gone"],
)
def test_a_damaged_row_is_told(tmp_path: Path, spoil: object, why: str) -> None:
    numbers = merged(Table("variate", COUNT, tmp_path), {}, {"a": values(1), "b": values(2)})
    assert callable(spoil)
    spoil(tmp_path / "a.1")
    table = Table("variate", COUNT, tmp_path)
    for _ in range(2):
        with pytest.raises(ServerError, match=rf"row 1 of client a .*{why}") as caught:
            table.check(numbers)
        assert caught.value.code == "FL-S206"
    with pytest.raises(ServerError, match="FL-S206"):
        merged(table, numbers, {"a": values(3)})
    assert torch.equal(held(table, numbers, "b"), values(2))


def test_a_row_forgotten_while_it_is_asked_for_is_no_error_of_the_server(tmp_path: Path) -> None:
    table = Table("variate", COUNT, tmp_path)
    merged(table, {}, {"a": values(1)})
    (tmp_path / "a.1").unlink()
    with pytest.raises(RemoteError, match=r"FL-W107.*own/a/1"):
        table.find("a", "own/a/1")


def test_rows_reach_the_disk_with_their_version_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("atoll.server.table.sync", lambda path: synced.append(path.name))
    table = Table("variate", COUNT, tmp_path)
    first = merged(table, {}, {"b": values(2), "a": values(1)})
    second = merged(table, first, {"a": values(3)})
    table.prune(second, {})
    table.sync()
    assert synced == ["a.2", "b.1", tmp_path.name]
    table.sync()
    assert len(synced) == 3


# ---- keeping -----------------------------------------------------------------------------------


def kept(table: Table, **most: int) -> list[str]:
    return [
        f"{client}.{n}"
        for client, last in most.items()
        for n in range(1, last + 1)
        if table.find(client, f"own/{client}/{n}") is not None
    ]


def test_rows_are_kept_for_whom_needs_them_and_no_longer(table: Table) -> None:
    """A slow client holds up its own row alone: not those of all others since its order began."""
    versions: list[Numbers] = [{}]
    for seed in range(4):
        versions.append(merged(table, versions[-1], {"a": values(seed), "slow": values(-seed)}))
    table.prune(versions[3], {"slow": [versions[1]]})
    assert kept(table, a=4, slow=4) == ["a.3", "a.4", "slow.1", "slow.3", "slow.4"]
    assert torch.equal(held(table, versions[1], "slow"), values(0))
    table.prune(versions[4], {"slow": [], "a": [{}]})
    assert kept(table, a=4, slow=4) == ["a.4", "slow.4"]


def test_rows_that_no_version_speaks_of_are_rolled_back(table: Table) -> None:
    first = merged(table, {}, {"a": values(1)})
    merged(table, first, {"a": values(2), "b": values(3)})
    table.roll_back(first)
    assert kept(table, a=2, b=2) == ["a.1"]
    again = merged(table, first, {"a": values(2)})
    assert torch.equal(held(table, again, "a"), values(2) + values(1))


def test_a_row_that_the_disk_does_not_let_go_is_told(tmp_path: Path) -> None:
    """It ended the server with FL-S100."""
    table = Table("variate", COUNT, tmp_path)
    merged(table, {}, {"a": values(1)})
    (tmp_path / "a.1").unlink()
    (tmp_path / "a.1").mkdir()
    with pytest.raises(ServerError, match=r"FL-S203: .*a\.1 cannot be written"):
        table.roll_back({})


def test_only_a_half_that_asks_for_one_has_a_table(tmp_path: Path) -> None:
    for half in (None, Dynamic(), Control()):
        assert table_of(half, COUNT, tmp_path / "rows") is None
    assert not (tmp_path / "rows").exists()
    made = table_of(Control(table=True), COUNT, tmp_path / "rows")
    assert made is not None
    assert (made.name, made.count) == ("variate", COUNT)


FIFTY = """
import sys
from pathlib import Path

import torch

from atoll.server.passes import Crew
from atoll.server.rewrite import rewrite
from atoll.server.table import Table


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


count, numbers = 1 << 20, {}  # rows of 4 MB
table, crew = Table("variate", count, Path(sys.argv[1])), Crew(2)
clients = [f"c{i:02}" for i in range(50)]
ones = lambda lo, hi, out: out[: hi - lo].fill_(1.0)
rewrite(table, crew, numbers, [("first", ones)], 1 << 18)
before = peak()
for commits in (1.0, 2.0):
    said = rewrite(table, crew, numbers, [(client, ones) for client in clients], 1 << 18)
    numbers |= said | {f"commits/{client}": commits for client in clients}
    assert all(table.blob(numbers, client).info.size == 4 * count for client in clients)
assert all(float(table.row(numbers, client)[-1]) == 2.0 for client in clients)
crew.close()
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_clients(tmp_path: Path) -> None:
    """50 rows of 4 MB, written twice: the peak of the process, mapped pages too, grows by a few."""
    told = subprocess.run(
        [sys.executable, "-c", FIFTY, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) < 40  # MB, of 400
