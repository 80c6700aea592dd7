"""Try a codec, yours or ours, on sections made from seeds, and on bytes that nobody encoded.

`check_codec(lambda: MyCodec(...))` packs hundreds of vectors - short, of odd length, all zero or
equal, subnormal, huge, with one spike - reads them back whole, tile by tile and into a sum, and
gives the decoder truncated, changed and random bytes. It raises AssertionError with the seed.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor

from atoll.protocols.codecs import Codec, Decoder, accumulate, fits
from atoll.protocols.errors import RAISED, RemoteError

Make = Callable[[], Codec]
COUNTS = (0, 1, 2, 7, 8, 9, 255, 256, 257, 4095, 4096, 4097)


def check_codec(make: Make, cases: int = 200, error: float = 1.01) -> None:
    """Hold `make()` to what a run needs of it, in `cases` cases.

    Sections as long as `size` says (at most so long where it is `variable`); the same values and
    state give the same bytes, also after the state went through a file; every tile reads as that
    part of the whole and adds as it reads; ||x - D(C(x))|| <= error * ||x||, which error feedback
    needs (a codec with `contractive` is held to it as that gives it); what is not finite does not
    come back finite; bytes that no encoder made are values or a RemoteError, and nothing else.
    """
    for seed in range(cases):
        try:
            _check(make(), make(), random.Random(f"codec/{seed}"), error)
        except RAISED as failed:
            why = failed if isinstance(failed, AssertionError) else f"it raises {failed!r}"
            raise AssertionError(f"seed {seed}: {why}") from failed


def _check(codec: Codec, twin: Codec, rng: random.Random, error: float) -> None:
    count = rng.choice((*COUNTS, rng.randint(10, 20_000)))
    kind, values = _values(rng, count)
    what = f"{codec.name}, {count} values, {kind}"
    state = _start(codec, count)
    payload = _encode(codec, values, state)
    variable = bool(getattr(codec, "variable", False))
    assert len(payload) == codec.size(count) or (variable and fits(codec, count, len(payload))), (
        f"{what}: {len(payload)} bytes, size says {codec.size(count)}"
    )
    _encode(twin, values.flip(0), state)  # of which it may keep nothing but in its state
    assert bytes(payload) == bytes(_encode(twin, values, _through_a_file(state))), (
        f"{what}: packed again, it is other bytes"
    )
    if variable or state is None:
        out = memoryview(bytearray(codec.size(count)))
        into, new = codec.encode(values.clone(), out), codec.encode(values.clone())
        assert bytes(into) == bytes(new), f"{what}: other bytes when packed into given ones"
        assert bytes(out[: len(into)]) == bytes(into), f"{what}: it does not write where it is told"
    back = _read(codec, payload, count)
    assert back.isfinite().all(), f"{what}: it does not come back finite"
    _check_tiles(codec, payload, back, rng, what)
    contractive = getattr(codec, "contractive", None)
    nearest = cast("Codec", contractive()) if contractive is not None else codec
    near = _read(nearest, _encode(nearest, values, _start(nearest, count)), count)
    lost = float((near.double() - values.double()).norm())
    whole = float(values.double().norm())
    assert lost <= error * whole + 1e-30 * count, f"{what}: loses {lost:g} of {whole:g}"
    if count:
        _check_not_finite(codec, values, rng, what)
        _check_hostile(codec, bytes(payload), count, rng, what)


def _check_tiles(
    codec: Codec, payload: memoryview, back: Tensor, rng: random.Random, what: str
) -> None:
    decode, count = codec.decoder(payload, back.numel()), back.numel()
    for _ in range(4):
        lo, hi = sorted((rng.randint(0, count), rng.randint(0, count)))
        tile = decode(lo, hi, torch.full((hi - lo,), torch.nan))
        assert tile.dtype == torch.float32, f"{what}: it reads as {tile.dtype}"
        assert torch.equal(tile, back[lo:hi]), f"{what}: [{lo}, {hi}) is not that part of the whole"
        total = torch.ones(hi - lo)
        accumulate(decode, lo, hi, total, 0.5, torch.empty(hi - lo))
        scale = 1 + float(back[lo:hi].abs().max()) if hi > lo else 1.0
        off = float((total - (1 + 0.5 * back[lo:hi])).abs().max()) if hi > lo else 0.0
        assert off <= 1e-5 * scale, f"{what}: [{lo}, {hi}) adds otherwise than it reads"


def _check_not_finite(codec: Codec, values: Tensor, rng: random.Random, what: str) -> None:
    wrong = values.clone()
    wrong[rng.randrange(values.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
    payload = _encode(codec, wrong, _start(codec, values.numel()))
    back = _read(codec, payload, values.numel())
    assert not back.isfinite().all(), f"{what}: NaN or Inf is hidden"


def _check_hostile(codec: Codec, payload: bytes, count: int, rng: random.Random, what: str) -> None:
    for bytes_ in _hostile(payload, codec, count, rng):
        try:
            decode: Decoder = codec.decoder(memoryview(bytes_), count)
            whole = decode(0, count, torch.empty(count))
        except RemoteError as refused:
            if not refused.code.startswith("FL-W"):
                raise AssertionError(f"{what}: hostile bytes are {refused.code}") from refused
            continue
        except Exception as crash:
            raise AssertionError(f"{what}: hostile bytes raise {crash!r}") from crash
        assert whole.shape == (count,), f"{what}: hostile bytes give {tuple(whole.shape)}"


def _hostile(payload: bytes, codec: Codec, count: int, rng: random.Random) -> Iterator[bytes]:
    """Of lengths that pass the check before a decoder is made."""
    yield rng.randbytes(len(payload))
    yield bytes(len(payload))
    yield b"\xff" * len(payload)
    for _ in range(4):
        changed = bytearray(payload)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        yield bytes(changed)
    if getattr(codec, "variable", False):
        for length in {1, rng.randint(1, len(payload)), len(payload) - 1, codec.size(count)}:
            if fits(codec, count, length):
                yield payload[:length].ljust(length, b"\0")


def _values(rng: random.Random, count: int) -> tuple[str, Tensor]:
    kind = rng.choice(
        ["normal", "zero", "equal", "subnormal", "huge", "spike", "thin", "wide", "negative zero"]
    )
    made = torch.randn(count, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    match kind:
        case "zero":
            made.zero_()
        case "negative zero":
            made.zero_().neg_()
        case "equal":
            made.fill_(rng.choice([1.0, -3.5, 1e-3]))
        case "subnormal":
            made.mul_(1e-40)
        case "huge":
            made.mul_(1e30)
        case "spike" if count:
            made[rng.randrange(count)] = 1e6
        case "thin":
            made[torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.99] = 0
        case "wide":
            made.mul_(10.0 ** torch.arange(count).remainder(12))
    return kind, made


def _start(codec: Codec, count: int) -> dict[str, Tensor] | None:
    start = getattr(codec, "start", None)
    return None if start is None else cast("dict[str, Tensor]", start(count))


def _encode(codec: Codec, values: Tensor, state: Mapping[str, Tensor] | None) -> memoryview:
    before = values.clone()
    if state is None:
        payload = codec.encode(values)
    else:
        payload = cast("Any", codec).encode_from(values, state, None)[0]
    assert torch.equal(before.nan_to_num(), values.nan_to_num()), f"{codec.name} changes values"
    return memoryview(bytes(payload))


def _through_a_file(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if state is None else load(save(state))


def _read(codec: Codec, payload: memoryview, count: int) -> Tensor:
    return codec.decoder(payload, count)(0, count, torch.empty(count)).clone()
