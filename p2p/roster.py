"""Roster: who is in the run. Entries certify themselves, whoever hands them on.

An entry is signed with the key that its peer's id is the hash of, and carries a proof of the run's
secret that is bound to that id. So it can be taken from a directory that anybody may write to, and
from gossip: what is false, too long, too old or of another run is refused, and harms nobody.
"""

import hashlib
import hmac
import ipaddress
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from atoll.aggregation import dylu
from atoll.p2p.identity import Identity, id_of, signed_by
from atoll.p2p.invite import Invite
from atoll.p2p.manifest import Manifest
from atoll.protocols import state
from atoll.protocols.errors import RemoteError

LARGEST = 4 << 10  # bytes of an entry
MEMBERS = 256  # at most
FRESH = 600.0  # seconds for which an entry is believed
AHEAD = 60.0  # seconds by which the date of one that another hands on may be before our clock
DOMAIN = b"atoll-roster-v1\0"
ADDRESSES = 8
KEY = re.compile("[0-9a-f]{64}")
ADDRESS = re.compile(
    r"/ip(?P<version>[46])/(?P<host>[0-9a-f.:]+)/(tcp|udp)/(?P<port>[0-9]{1,5})"
    r"(/[a-z0-9-]+)*/p2p/(?P<peer>[0-9A-Za-z]+)"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A peer by its own word. ValueError where a value cannot be."""

    peer: str  # libp2p id
    name: str  # for people
    accepts: bool  # others can connect to it
    bandwidth: float  # bytes a second; 0: not measured
    speed: float  # local steps a second; 0: not measured
    schema: str  # hash of its model's names, shapes and dtypes
    addresses: tuple[str, ...]  # multiaddrs
    bulk: str  # how to reach its bulk beside libp2p, as its transport writes it; "": it has none
    key: str  # of its seals: Ed25519, public, hex
    at: float  # Unix time of writing; the newest counts

    def __post_init__(self) -> None:
        texts = (self.peer, self.name, self.schema, self.bulk, *self.addresses)
        if not all(len(t) <= 512 and t.isprintable() for t in texts) or len(self.name) > 64:
            raise ValueError("texts of an entry are printable, a name has at most 64 characters")
        if len(self.addresses) > ADDRESSES:
            raise ValueError(f"{len(self.addresses)} addresses, at most {ADDRESSES}")
        if not KEY.fullmatch(self.key):
            raise ValueError("the key of an entry has 64 hexadecimal digits")
        for address in self.addresses:  # daemons are started with them, and refuse all for one
            if not leads(address, self.peer):
                raise ValueError(f"{address[:80]!r} is no address of {self.peer}")
        for value in (self.bandwidth, self.speed, self.at):
            if not 0 <= value < math.inf:
                raise ValueError(f"{value} is no measure")


def leads(address: str, peer: str) -> bool:
    """Whether it is a multiaddr by which `peer` may be reached, as its daemon would print it."""
    found = ADDRESS.fullmatch(address)
    if found is None or found["peer"] != peer or int(found["port"]) > 65535:
        return False
    try:
        return ipaddress.ip_address(found["host"]).version == int(found["version"])
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class _Letter:
    """An entry as it travels."""

    said: str  # JSON of the Entry, as it was signed
    key: str  # public key, DER in hex
    signature: str  # hex
    proof: str  # hex


def proof(invite: Invite, peer: str) -> str:
    """That whoever says it to be `peer` holds the secret of this run."""
    what = "\n".join(("atoll-peer-v1", invite.run, invite.manifest, peer)).encode()
    return hmac.new(invite.secret, what, hashlib.sha256).hexdigest()


def proven(invite: Invite, peer: str, shown: str) -> bool:
    return hmac.compare_digest(proof(invite, peer).encode(), shown.encode(errors="replace"))


def write(entry: Entry, identity: Identity, invite: Invite) -> bytes:
    """An entry as it travels. ValueError where it is too long."""
    said = state.dumps(entry)
    signature = identity.sign(DOMAIN + said.encode())
    letter = _Letter(said, identity.public.hex(), signature.hex(), proof(invite, entry.peer))
    data = state.dumps(letter).encode()
    if len(data) > LARGEST:
        raise ValueError(f"an entry of {len(data)} bytes, at most {LARGEST}")
    return data


def read(data: bytes, invite: Invite) -> Entry | RemoteError:
    """The entry, if all of it is true. Nothing in `data` makes it raise."""
    if len(data) > LARGEST:
        return _malformed(f"{len(data)} bytes, at most {LARGEST}")
    try:
        letter = state.loads(_Letter, data.decode())
        entry = state.loads(Entry, letter.said)
        public, signature = bytes.fromhex(letter.key), bytes.fromhex(letter.signature)
        signed = letter.said.encode()
    except (ValueError, RecursionError, OverflowError) as error:
        return _malformed(str(error)[:200])
    if id_of(public) != entry.peer or not signed_by(public, signature, DOMAIN + signed):
        return _malformed("it is not signed by its peer")
    if not proven(invite, entry.peer, letter.proof):
        return no_proof(entry.peer)
    return entry


@dataclass(slots=True)
class _Known:
    entry: Entry
    data: bytes  # as it was written
    fresh: float  # when its peer was last heard, by `clock`


@dataclass
class Roster:
    """Pure: the caller has the clocks. `now` is Unix time, `clock` seconds that nobody sets: whose
    clock is set while it takes part forgets nobody, and is not forgotten."""

    invite: Invite
    me: str  # is never an entry of this
    _known: dict[str, _Known] = field(default_factory=dict)
    _gone: dict[str, float] = field(default_factory=dict)  # peer -> its entries up to then are old

    def hear(
        self, data: bytes, now: float, clock: float, caller: str | None = None
    ) -> Entry | RemoteError:
        """Take an entry in; `caller`: who brings it must be who it is about. It is there, whatever
        its clock says; of another's entry only the date tells that it is not an old one. A known
        one, or an older one, changes nothing: the entry that counts is returned."""
        entry = read(data, self.invite)
        if isinstance(entry, RemoteError):
            return entry
        if caller is not None and caller != entry.peer:
            return _malformed("it is another peer's")
        others = caller is None and entry.peer != self.me
        if others and not now - FRESH <= entry.at <= now + AHEAD:
            return _malformed(f"it was written {now - entry.at:.0f} s ago; are both clocks right?")
        if entry.at <= self._gone.get(entry.peer, 0.0):
            return _malformed("its peer has left since")
        fresh = clock if caller is not None else clock - max(0.0, now - entry.at)
        known = self._known.get(entry.peer)
        if known is not None:
            known.fresh = max(known.fresh, fresh)
            if known.entry.at >= entry.at:
                return known.entry
            fresh = known.fresh
        if known is None and len(self._known) >= MEMBERS and entry.peer != self.me:
            return RemoteError("FL-P307", f"the run has {MEMBERS} members", "try again later")
        if entry.peer != self.me:
            self._known[entry.peer] = _Known(entry, data, fresh)
        return entry

    def entries(self) -> list[Entry]:
        """All, by peer."""
        return [self._known[peer].entry for peer in sorted(self._known)]

    def letters(self) -> list[bytes]:
        """All as they were written, newest first: what is handed on."""
        newest = sorted(self._known.values(), key=lambda one: (-one.entry.at, one.entry.peer))
        return [one.data for one in newest]

    def holds(self, peer: str) -> bool:
        return peer in self._known

    def get(self, peer: str) -> Entry | None:
        return self._known[peer].entry if peer in self._known else None

    def forget(self, peer: str) -> None:
        """It has left: only an entry written after its last one brings it back."""
        if peer in self._known:
            self._gone[peer] = self._known.pop(peer).entry.at
            while len(self._gone) > MEMBERS:
                del self._gone[next(iter(self._gone))]

    def expire(self, clock: float) -> list[str]:
        """Forget those who were not heard for long; who they are. They come back when they speak,
        and what others still hand on of them is too old."""
        old = [p for p, known in sorted(self._known.items()) if known.fresh < clock - FRESH]
        for peer in old:
            del self._known[peer]
        return old


def share(entry: Entry, manifest: Manifest) -> float:
    """Of a founder's work, that a peer does in a round: 1/8 to 1, by its measured speed. Nobody
    gains by a claim: more than a whole share does not exist."""
    return dylu.share(entry.speed, manifest.speed)


def local_steps(entry: Entry, manifest: Manifest) -> int:
    return dylu.local_steps(manifest.local_steps, share(entry, manifest))


def weight(entry: Entry, manifest: Manifest) -> float:
    """In the mean: examples of a round, by rule, so that all peers reckon the same."""
    return float(local_steps(entry, manifest) * manifest.batch)


def gossip(letters: Iterable[bytes]) -> bytes:
    """Entries as one message; the first is the speaker's own."""
    return json.dumps([letter.decode() for letter in letters], separators=(",", ":")).encode()


def gossiped(data: bytes) -> list[bytes]:
    """ValueError where it is none."""
    told = json.loads(data)
    if not isinstance(told, list) or not 0 < len(told) <= MEMBERS + 1:
        raise ValueError(f"1 to {MEMBERS + 1} entries, as a list")
    if not all(isinstance(one, str) and len(one) <= LARGEST for one in told):
        raise ValueError("entries are texts")
    return [one.encode(errors="replace") for one in told]


def no_proof(peer: str) -> RemoteError:
    return RemoteError(
        "FL-P304",
        f"peer {peer} has not shown that it holds the run's secret",
        "join with an invite of this run: fl-peer join INVITE",
    )


def _malformed(why: str) -> RemoteError:
    return RemoteError("FL-P305", f"an entry that cannot be taken: {why}", "it is ignored")
