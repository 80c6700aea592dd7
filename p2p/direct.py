"""Direct: bulk between peers that reach each other, over gRPC and TLS, past the daemons.

Each byte through libp2p crosses two daemons and is encrypted by one and decrypted by the other; a
direct connection spares half of the work of an all-reduce. Who is who comes from libp2p all the
same: a peer asks another by a call for its port, its certificate and a token of its own, so the
certificate is the one of that peer and the token says who asks. TLS guards the bytes on their way;
SHA-256 comes along where the giver knows it, and is then compared.
"""

import asyncio
import contextlib
import datetime
import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from atoll.p2p.bulk import Find, Got, Moved, timed, unheard
from atoll.p2p.node import Node
from atoll.protocols import frames
from atoll.protocols.blobs import CHUNK
from atoll.protocols.channel import CHANNEL_OPTIONS, SERVER_OPTIONS
from atoll.protocols.errors import RemoteError

NAME = "atoll.direct"
METHOD = "/atoll.v1.Peer/Fetch"
HOST = "atoll-peer"  # in every certificate: it is pinned, so its name says nothing
THREADS = 32  # transfers at a time
CONNECT_SECONDS = 2.0
IDLE_SECONDS = 10.0  # without a chunk
AVOIDED_SECONDS = 60.0  # a peer that could not be reached is not tried again before

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Line:
    """A connection to one peer."""

    channel: Any
    token: str


class Direct:
    """`open` it beside a node; `serve` is `Gate.serve` or `Node.serve`, which says who calls."""

    def __init__(self, node: Node, find: Find, gave: Moved = unheard) -> None:
        self._node, self._find, self._gave = node, find, gave
        self._server: Any = None
        self._port = 0
        self._certificate = b""
        self._tokens: dict[str, str] = {}  # token -> who was given it
        self._lines: dict[str, _Line] = {}
        self._avoided: dict[str, float] = {}  # peer -> until when
        self._connecting: dict[str, asyncio.Lock] = {}
        # Its own: who waits here for a part must not keep a thread from who makes that part.
        self._threads = ThreadPoolExecutor(THREADS, "direct")

    async def open(self, host: str = "") -> None:
        """Listen at `host`; "": where the node listens, and no further."""
        host = host or next((h for a in self._node.listen if (h := _host(a))), "127.0.0.1")
        key, self._certificate = await asyncio.to_thread(_self_signed)
        handler = grpc.method_handlers_generic_handler(
            "atoll.v1.Peer", {"Fetch": grpc.unary_stream_rpc_method_handler(self._give)}
        )
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((handler,))
        proof = grpc.ssl_server_credentials([(key, self._certificate)])
        self._port = self._server.add_secure_port(f"{host}:0", proof)
        await self._server.start()

    async def close(self) -> None:
        for line in self._lines.values():
            line.channel.close()
        if self._server is not None:
            await self._server.stop(0.2)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def offer(self, peer: str, _: bytes) -> bytes:
        """The answer to a call of `NAME`."""
        token = next((t for t, who in self._tokens.items() if who == peer), "")
        if not token:
            token = secrets.token_urlsafe(24)
            self._tokens[token] = peer
        hosts = sorted({h for a in await self._node.addresses() if (h := _host(a))})
        said = {"port": self._port, "hosts": hosts, "token": token}
        return json.dumps({**said, "certificate": self._certificate.decode()}).encode()

    def forget(self, peer: str) -> None:
        """It is in the run no longer: what it was given opens nothing."""
        self._tokens = {t: who for t, who in self._tokens.items() if who != peer}
        if (line := self._lines.pop(peer, None)) is not None:
            line.channel.close()

    # ---- taking --------------------------------------------------------------------------------

    async def fetch(self, peer: str, blob: str, dest: memoryview, *, shorter: bool = False) -> Got:
        """As `bulk.fetch`, but once: RemoteError FL-P203 where it breaks off or cannot begin."""
        line = await self._line(peer)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, _take, line, blob, dest, shorter)
        except RemoteError as error:
            if error.code == "FL-P203":
                if self._lines.get(peer) is line:  # it may have come back, with another certificate
                    del self._lines[peer]
                line.channel.close()
            raise

    async def _line(self, peer: str) -> _Line:
        async with self._connecting.setdefault(peer, asyncio.Lock()):
            if peer in self._lines:
                return self._lines[peer]
            now = asyncio.get_running_loop().time()
            if self._avoided.get(peer, now) > now:
                raise _broken(peer, "it could not be reached a moment ago")
            try:
                answer = await self._node.call(peer, NAME, b"", 5.0)
                self._lines[peer] = await asyncio.to_thread(_connect, peer, answer)
            except RemoteError:
                self._avoided[peer] = now + AVOIDED_SECONDS
                raise
            return self._lines[peer]

    # ---- giving --------------------------------------------------------------------------------

    async def _give(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            asked = json.loads(request[:4096])
            peer, blob = self._tokens[asked["token"]], asked["blob"]
            if not isinstance(blob, str) or len(blob) > 128:
                raise TypeError(blob)
        except (ValueError, KeyError, TypeError, RecursionError):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "FL-P402\nno such token\nask anew")
            return
        try:
            found = await self._find(peer, blob)
        except RemoteError as error:
            told = "\n".join((error.code, error.message, error.hint))
            await context.abort(grpc.StatusCode.NOT_FOUND, told)
            return
        crcs = found.crcs or [0] * (len(found.view) // CHUNK + 1)  # TLS guards them on their way
        coming = frames.chunks(found.view, "", crcs=crcs, digest=found.info.sha256)
        for frame in timed(coming, self._gave):
            yield frame


def _take(line: _Line, blob: str, dest: memoryview, shorter: bool) -> Got:
    asked = json.dumps({"token": line.token, "blob": blob}).encode()
    try:
        call = line.channel.unary_stream(METHOD)(asked)
    except ValueError as error:  # closed, since another transfer over it broke off
        raise _broken(blob, "its connection is closed") from error
    watch = _Watch(call)
    held, began, sha256, sha = 0, 0.0, b"", hashlib.sha256()
    hashing = not blob.startswith("in/")  # nobody compares an input's
    try:
        for message in call:
            watch.alive()
            began = began or time.monotonic()
            chunk = frames.parse(message)
            end = held + len(chunk.data)
            if chunk.offset != held or end > len(dest):
                raise RemoteError(
                    "FL-W103", f"{blob}: bytes {chunk.offset} to {end}", "ask another"
                )
            dest[held:end] = chunk.data
            if hashing:
                sha.update(dest[held:end])
            held = end
            if chunk.last:
                sha256 = chunk.sha256
                break
        else:
            raise _broken(blob, f"the stream ended at {held}")
    except grpc.RpcError as error:
        raise _refusal(blob, error) from error
    finally:
        watch.end()
        call.cancel()
    if held != len(dest) and not shorter:
        raise RemoteError("FL-W103", f"{blob} has {held} bytes, not {len(dest)}", "ask another")
    found = sha.digest() if hashing else sha256
    if sha256 and found != sha256:
        raise RemoteError("FL-W105", f"{blob} has SHA-256 {found.hex()}", "ask another peer for it")
    return Got(found, held, time.monotonic() - began)


class _Watch:
    """Cancels a call from which nothing has come for a while."""

    def __init__(self, call: Any) -> None:
        self._call, self._last, self._over = call, time.monotonic(), threading.Event()
        threading.Thread(target=self._look, name="direct-watch", daemon=True).start()

    def alive(self) -> None:
        self._last = time.monotonic()

    def end(self) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(1.0):
            if time.monotonic() - self._last > IDLE_SECONDS:
                self._call.cancel()
                return


def _connect(peer: str, answer: bytes) -> _Line:
    try:
        said = json.loads(answer)
        port, token, hosts = int(said["port"]), str(said["token"]), [str(h) for h in said["hosts"]]
        certificate = str(said["certificate"]).encode()
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(peer, "a malformed answer") from error
    proof = grpc.ssl_channel_credentials(root_certificates=certificate)
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", HOST)]
    for host in hosts[:8]:
        channel = grpc.secure_channel(f"{host}:{port}", proof, options=options)
        with contextlib.suppress(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
            return _Line(channel, token)
        channel.close()
    raise _broken(peer, f"not reached at port {port} of {', '.join(hosts[:8])}")


def _self_signed() -> tuple[bytes, bytes]:
    """A key and a certificate for this process's life, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    plain = serialization.NoEncryption()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain
    )
    return private, made.public_bytes(serialization.Encoding.PEM)


def _host(address: str) -> str:
    """Of a multiaddr like /ip4/10.0.0.7/tcp/4001/p2p/Qm...; "" where it is of another kind."""
    parts: Sequence[str] = address.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return ""
    return parts[2] if parts[1] == "ip4" else f"[{parts[2]}]"


def _refusal(blob: str, error: grpc.RpcError) -> RemoteError:
    code, *rest = str(error.details()).split("\n")
    if error.code() == grpc.StatusCode.NOT_FOUND and code.startswith("FL-") and len(rest) == 2:
        return RemoteError(code[:16], rest[0][:500], rest[1][:500])
    return _broken(blob, f"{error.code().name}: {str(error.details())[:200]}")


def _broken(what: str, why: str) -> RemoteError:
    return RemoteError("FL-P203", f"{what}: {why}", "it comes through the daemon instead")
