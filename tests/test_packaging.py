"""Packaging: five folders become atoll.*, and nothing generic lands in site-packages."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = sorted(p.parent.name for p in ROOT.glob("*/__init__.py"))


def test_the_packages_are_the_folders_that_hold_an_init() -> None:
    """A folder that is not listed is left out of the wheel without a word."""
    setuptools = PROJECT["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == [f"atoll.{folder}" for folder in FOLDERS]
    assert setuptools["package-dir"] == {f"atoll.{folder}": folder for folder in FOLDERS}


def test_the_folders_are_flat() -> None:
    assert not [p for folder in FOLDERS for p in (ROOT / folder).rglob("*/__init__.py")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_type_checkers_find_each_folder_and_may_trust_its_types(folder: str) -> None:
    assert (ROOT / ".types" / "atoll" / folder).resolve() == ROOT / folder
    assert (ROOT / folder / "py.typed").exists()


def test_torch_is_pinned_for_us_only() -> None:
    """The constraint gives CI the CPU build; a user keeps the torch that fits the GPU."""
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in constraints
    assert "torch>=2.6" in PROJECT["project"]["dependencies"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is: an sdist, and the wheel from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.mark.slow
def test_a_wheel_from_the_sdist_holds_the_whole_of_atoll_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in names} == {"atoll"}
    wanted = {
        f"atoll/{folder}/{file.name}"
        for folder in FOLDERS
        for pattern in ("*.py", "*.pyi", "*.proto", "py.typed")
        for file in (ROOT / folder).glob(pattern)
    }
    assert names == wanted
    assert {"atoll/protocols/wire.proto", "atoll/protocols/wire_pb2.pyi"} <= names


@pytest.mark.slow
def test_the_wheel_installs_nothing_called_server_and_imports(wheel: Path, tmp_path: Path) -> None:
    """Installed without its dependencies into a folder of its own; the brain needs none."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    assert {p.name.split("-")[0] for p in site.iterdir()} == {"atoll", "bin"}
    assert {p.name for p in (site / "bin").iterdir()} == {"fl-server", "fl-client", "fl-peer"}
    program = "import atoll.aggregation as a; print(a.FedAvg.__name__, a.__file__)"
    told = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {program}"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert told.stdout.startswith(f"FedAvg {site}")
