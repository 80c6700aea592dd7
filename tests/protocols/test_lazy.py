"""Lazy exports: a name costs its import when it is first used, and not before."""

import subprocess
import sys

import pytest

from atoll.protocols.lazy import exports


def test_a_name_is_found_in_the_module_that_holds_it() -> None:
    find = exports("atoll.protocols", {"AtollError": "errors"})
    from atoll.protocols.errors import AtollError

    assert find("AtollError") is AtollError


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    find = exports("atoll.protocols", {"AtollError": "errors"})
    with pytest.raises(AttributeError, match=r"module 'atoll\.protocols' has no attribute 'Atol'"):
        find("Atol")


def test_importing_the_packages_imports_none_of_their_modules() -> None:
    program = (
        "import sys, atoll.aggregation, atoll.client, atoll.p2p, atoll.protocols, atoll.server\n"
        "print(sorted(m for m in sys.modules if m.startswith('atoll.') and m.count('.') > 1))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert told.stdout == "['atoll.protocols.lazy']\n"
