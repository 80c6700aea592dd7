"""--version of the three commands: told at once, without torch, hivemind or grpc."""

import subprocess
import sys
from importlib.metadata import version

import pytest

ASK = """
import sys
from atoll.{folder}.cli import main
sys.argv = ["{name}", "--version"]
try:
    main()
finally:
    assert not {{"torch", "hivemind", "grpc"}} & sys.modules.keys()
"""


@pytest.mark.parametrize("folder", ["server", "client", "p2p"])
def test_a_command_tells_its_version_and_imports_nothing_heavy(folder: str) -> None:
    name = {"server": "fl-server", "client": "fl-client", "p2p": "fl-peer"}[folder]
    asked = [sys.executable, "-c", ASK.format(folder=folder, name=name)]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stdout) == (0, f"{name} {version('atoll')}\n"), told.stderr
