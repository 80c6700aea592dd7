"""Your own codec: one byte a value, in 255 steps from the smallest to the largest.

    python own_codec.py                          in virtual time
    fl-server demo --codec up=own_codec:Bytes    in real processes

`check_codec(Bytes)` of atoll.aggregation tries it on 200 generated vectors.
"""

import struct

import torch
from torch import Tensor

from atoll.protocols.codecs import Decoder


class Bytes:
    name = "own_codec:Bytes"
    gives = frozenset({"lossy"})  # see atoll.protocols.facts

    def size(self, count: int) -> int:
        return 8 + count  # the smallest and a step, as float32, before the codes

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        out = memoryview(bytearray(self.size(len(values)))) if out is None else out
        low, high = values.aminmax() if len(values) else (torch.zeros(()), torch.zeros(()))
        step = (high - low) / 255  # NaN or Inf where a value is: they come back, and are found
        struct.pack_into("<ff", out, 0, low, step)
        codes = ((values - low) / step).nan_to_num(0, 0, 0).round().to(torch.uint8)
        out[8:] = codes.numpy().tobytes()
        return out

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        low, step = struct.unpack_from("<ff", payload)
        codes = torch.frombuffer(bytearray(payload[8:]) or bytearray(1), dtype=torch.uint8)
        return lambda lo, hi, out: torch.mul(codes[lo:hi], step, out=out[: hi - lo]).add_(low)


if __name__ == "__main__":
    from atoll.aggregation import FedAvg
    from atoll.server import Training, simulate

    clients = dict.fromkeys("abcd", 0.1)
    learning = Training.of(list(clients), up="own_codec:Bytes")
    print(simulate(FedAvg(rounds=4, min_clients=4), clients, learning=learning))
