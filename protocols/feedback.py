"""Error feedback: what a codec lost is kept and sent next time, so that nothing is lost for good.

Seide et al. 2014 (1-bit SGD), https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html;
Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847. A client sends C(a) with
a = decay * e + delta and keeps e = a - D(C(a)), its residual. With decay 1 everything sent and the
residual add up to everything learned.

The residual is the client's own and private. Nothing here holds it: state goes in and comes out as
named tensors, which a driver keeps (before the answer is known both the old and the new one). If
the outcome is that a contribution was not used, `restore` gives back what had been sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from atoll.protocols.codecs import TILE, Codec, Decoder
from atoll.protocols.codecspec import ErrorFeedback

RESIDUAL = "residual"  # a flat float32 vector of the trainable tensors
CODEC = "codec/"  # what the codec itself remembers, see `Codec.start`
State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Sent:
    """What goes out, and what the client keeps if it does."""

    payload: memoryview
    state: dict[str, Tensor]
    forgotten: bool = False  # the residual had grown too long, and was dropped


def send(
    codec: Codec,
    rule: ErrorFeedback | None,
    delta: Tensor,
    state: State,
    out: memoryview | None = None,
) -> Sent:
    """Pack `delta`, flat float32 on the CPU, which is overwritten: where there is a `rule` it
    becomes the new residual.

    `state` is what the last `Sent` gave, {} at first; it is left as it is, so that a driver can go
    back to it. Where `delta` is not finite, so is the payload, and that `Sent` must not be kept.
    """
    residual = state.get(RESIDUAL) if rule is not None else None
    forgotten = False
    if rule is not None and residual is not None:
        forgotten = too_long(rule, residual, delta)
        if not forgotten:
            delta.add_(residual, alpha=rule.decay)
    payload, kept = _encode(codec, delta, state, out)
    if rule is not None:
        subtract(codec.decoder(payload, delta.numel()), delta)
        kept[RESIDUAL] = delta
    return Sent(payload, kept, forgotten)


def restore(codec: Codec, state: State, payload: memoryview) -> dict[str, Tensor]:
    """The state after an outcome that says `payload` was not used: e <- e + D(payload).

    The residual is changed in place. No-op without a residual.
    """
    residual = state.get(RESIDUAL)
    if residual is not None:
        decode, spare = codec.decoder(payload, residual.numel()), _spare(residual)
        for lo in range(0, residual.numel(), TILE):
            hi = min(lo + TILE, residual.numel())
            residual[lo:hi].add_(decode(lo, hi, spare))
    return dict(state)


class Sender:
    """A codec as one client packs one update with it: what was lost before goes along.

    For whoever packs by `Codec.encode`. It overwrites the values it packs; afterwards `after` is
    the state to keep with the update, and the one before is as it was.
    """

    def __init__(self, codec: Codec, rule: ErrorFeedback | None, state: State) -> None:
        self.name, self.size, self.decoder = codec.name, codec.size, codec.decoder
        self.trainable_only = bool(getattr(codec, "trainable_only", False))
        self.variable = bool(getattr(codec, "variable", False))
        self._codec, self._rule, self._state = codec, rule, state
        self.after: dict[str, Tensor] = dict(state)

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        sent = send(self._codec, self._rule, values, self._state, out)
        self.after = sent.state
        return sent.payload


def too_long(rule: ErrorFeedback, residual: Tensor, delta: Tensor) -> bool:
    """Whether the residual is to be forgotten: ||e|| > reset * ||delta||."""
    if not rule.reset:
        return False
    return bool(torch.linalg.vector_norm(residual) > rule.reset * torch.linalg.vector_norm(delta))


def subtract(decode: Decoder, values: Tensor) -> None:
    """values -= what `decode` reads, tile by tile, every element rounded once."""
    spare = _spare(values)
    for lo in range(0, values.numel(), TILE):
        hi = min(lo + TILE, values.numel())
        values[lo:hi].sub_(decode(lo, hi, spare))


def _encode(
    codec: Codec, values: Tensor, state: State, out: memoryview | None
) -> tuple[memoryview, dict[str, Tensor]]:
    encode_from = getattr(codec, "encode_from", None)
    if encode_from is None:
        return codec.encode(values, out), {}
    mine = {k.removeprefix(CODEC): v for k, v in state.items() if k.startswith(CODEC)}
    payload, after = cast("tuple[memoryview, Mapping[str, Tensor]]", encode_from(values, mine, out))
    return payload, {f"{CODEC}{k}": v for k, v in after.items()}


def _spare(values: Tensor) -> Tensor:
    return torch.empty(min(TILE, values.numel()))
