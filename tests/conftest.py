"""What all tests share: the same random examples every time, and `--rewrite` for transcripts."""

import pytest
from hypothesis import settings

settings.register_profile("atoll", derandomize=True, database=None, deadline=None)
settings.load_profile("atoll")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write tests/transcripts/*.txt anew from the code"
    )
