"""fl-server, also as `python -m atoll.server`."""

from typing import NoReturn

from atoll.protocols.entry import start


def main() -> NoReturn:
    start("atoll.server.cli")


if __name__ == "__main__":
    main()
