"""The brain: when to train and what to merge (strategies), how to merge it, and the outer step."""

from typing import TYPE_CHECKING

from atoll.protocols.lazy import exports

if TYPE_CHECKING:
    from atoll.aggregation.fedavg import FedAvg as FedAvg
    from atoll.aggregation.fedbuff import FedBuff as FedBuff
    from atoll.aggregation.fedcompass import FedCompass as FedCompass
    from atoll.aggregation.strategy import Strategy as Strategy

__getattr__ = exports(
    __name__,
    {
        "FedAvg": "fedavg",
        "FedBuff": "fedbuff",
        "FedCompass": "fedcompass",
        "Strategy": "strategy",
    },
)
