"""fl-client, also as `python -m atoll.client`."""

from typing import NoReturn

from atoll.protocols.entry import start


def main() -> NoReturn:
    start("atoll.client.cli", garbage_every=7000)


if __name__ == "__main__":
    main()
