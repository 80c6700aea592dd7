"""A command that is interrupted before it has begun says nothing, as one that has."""

import subprocess
import sys

import pytest

CODE = """
import sys

class Interrupting:
    '''Ctrl-C in the midst of the imports.'''
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
from atoll.{part}.__main__ import main
sys.argv = ["it", "--help"]
main()
"""


@pytest.mark.parametrize("part", ["server", "client", "p2p"])
@pytest.mark.parametrize(("name", "code"), [("click", 130), ("nothing", 0)])
def test_an_interrupt_during_the_imports_is_exit_130_without_a_word(
    part: str, name: str, code: int
) -> None:
    run = [sys.executable, "-c", CODE.format(part=part, name=name)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ("Usage" in ended.stdout) == (code == 0)
