"""Topics: half a megabyte of English that is there wherever Python is, to train on with no file.

It is the reference text behind Python's own `help()` (`pydoc_data.topics`, under Python's licence),
as characters of a fixed alphabet: its text changes a little with Python's version, but the model
that fits it does not.
"""

import string

import torch

from atoll.client.data import Data
from atoll.client.sources import Options, take_options, whole, windowed

ALPHABET = "\n " + string.digits + string.ascii_letters + string.punctuation  # 96 characters
OTHER = "?"  # stands for all others


def topics(path: str, options: Options, seed: int) -> Data:
    """The first 90 % to train, the rest to test, in windows of `context` characters."""
    context = whole("topics", take_options("topics", options, ("context",)), "context", 64, least=2)
    token = torch.zeros(128, dtype=torch.int64)
    token[list(ALPHABET.encode())] = torch.arange(len(ALPHABET))
    tokens = token[torch.frombuffer(bytearray(library_text().encode()), dtype=torch.uint8).int()]
    return windowed("topics", tokens, ALPHABET, context)


def library_text() -> str:
    """All topics in the order of their names, in the letters of ALPHABET."""
    from pydoc_data.topics import topics as found

    known = frozenset(ALPHABET)
    text = "\n\n".join(found[name] for name in sorted(found))
    return "".join(c if c in known else OTHER for c in text)
