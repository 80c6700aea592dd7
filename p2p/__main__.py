"""fl-peer, also as `python -m atoll.p2p`."""

from typing import NoReturn

from atoll.protocols.entry import start


def main() -> NoReturn:
    start("atoll.p2p.cli", garbage_every=7000)


if __name__ == "__main__":
    main()
