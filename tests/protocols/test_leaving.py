"""Leaving: Ctrl-C or SIGTERM ends a process at once, whatever its threads are in, and says so."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from atoll.protocols import leaving

BUSY = """
import os, signal, threading, time
from atoll.protocols import leaving
leaving.at_once({as_json})
threading.Thread(target=time.sleep, args=(60,)).start()  # the end of the process waits for it
print("data", end="")
os.kill(os.getpid(), signal.{number})
"""


@pytest.mark.parametrize("number", leaving.SIGNALS)
@pytest.mark.parametrize("as_json", [False, True])
def test_it_does_not_wait_for_a_thread_and_is_130(as_json: bool, number: signal.Signals) -> None:
    run = [sys.executable, "-c", BUSY.format(as_json=as_json, number=number.name)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 130
    assert ended.stdout.startswith("data")
    if as_json:
        error = json.loads(ended.stdout.removeprefix("data"))["error"]
        assert (error["code"], ended.stderr) == ("FL-S208", "")
    else:
        assert ended.stderr.startswith("error FL-S208: interrupted\n")


def test_afterwards_signals_are_as_they_were() -> None:
    before = [signal.getsignal(number) for number in leaving.SIGNALS]
    with leaving.while_it_begins(as_json=False):
        for number, handler in zip(leaving.SIGNALS, before, strict=True):
            assert signal.getsignal(number) is not handler
    assert [signal.getsignal(number) for number in leaving.SIGNALS] == before


def test_a_demo_that_is_told_to_end_is_interrupted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), leaving.as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_that_is_not_the_main_one_sets_none() -> None:
    done = []

    def begin() -> None:
        with leaving.while_it_begins(as_json=False), leaving.as_interrupted():
            done.append(1)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert done == [1]
