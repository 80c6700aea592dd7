"""What a server tells of its run before a client says hello."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atoll.protocols.errors import RemoteError
from atoll.protocols.manifest import Manifest


@dataclass(frozen=True)
class RunInfo:
    """A run, as its server tells of it."""

    id: str
    name: str
    model: str  # a built-in name, or module:object that the client must have itself
    data: str
    algorithm: str  # local algorithm
    local: dict[str, bool | int | float | str]  # of the trainer's configuration
    seed: int
    codec_up: str
    codec_down: str
    manifest: Manifest
    local_dp: str  # noise that each client is asked for; empty: none
    validate: float = 0.0  # share of its examples a client is to hold out, to judge models by

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "RunInfo":
        """Read strictly; RemoteError FL-W101."""
        try:
            texts = {k: told[k] for k in ("id", "name", "model", "data", "algorithm")}
            texts |= {k: told[k] for k in ("codec_up", "codec_down")}
            texts |= {"local_dp": told["local_dp"]}
            local, seed, manifest = told["local"], told["seed"], told["manifest"]
            validate = told.get("validate", 0.0)
        except (KeyError, TypeError) as error:
            raise _malformed(f"{error} is missing") from error
        for key, value in texts.items():
            if not isinstance(value, str) or len(value) > 1000:
                raise _malformed(f"{key}={value!r}")
        if not isinstance(validate, int | float) or not 0 <= validate < 1:
            raise _malformed(f"validate={validate!r}")
        if type(seed) is not int or not isinstance(local, dict):
            raise _malformed(f"seed={seed!r}, local={local!r}")
        for value in local.values():
            number = not isinstance(value, float) or math.isfinite(value)
            if not isinstance(value, bool | int | float | str) or not number:
                raise _malformed(f"local={local!r}")
        read = Manifest.from_json(manifest)
        return cls(**texts, local=local, seed=seed, manifest=read, validate=float(validate))


def _malformed(what: str) -> RemoteError:
    return RemoteError("FL-W101", f"malformed run: {what}"[:300], "install the server's version")
