"""The README keeps its word: its strategy runs, its links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_strategy_of_the_readme_makes_its_ten_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "pairs.py").write_text(code)
    runpy.run_path(str(tmp_path / "pairs.py"), run_name="__main__")
    assert "10 versions" in capsys.readouterr().out


def test_a_strategy_takes_twenty_lines() -> None:
    (code,) = re.findall(r"@dataclass\n(.*?)\n\n\nif", README, re.DOTALL)
    assert len(code.splitlines()) <= 20


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    paths = re.findall(r"`([a-z0-9_]+/[a-z_]+\.[a-z]+)`", text)
    for name in [str((ROOT / page).parent / link) for link in links] + [
        str(ROOT / path) for path in paths
    ]:
        assert Path(name).exists(), f"{page}: {name}"
