"""The brain: when to train and what to merge (strategies), how to merge it, and the outer step."""

from typing import TYPE_CHECKING

from atoll.protocols.lazy import exports

if TYPE_CHECKING:
    from atoll.aggregation.centered_clipping import CenteredClipping as CenteredClipping
    from atoll.aggregation.fedavg import FedAvg as FedAvg
    from atoll.aggregation.fedbuff import FedBuff as FedBuff
    from atoll.aggregation.fedbuff import fedasync as fedasync
    from atoll.aggregation.fedcompass import FedCompass as FedCompass
    from atoll.aggregation.krum import Krum as Krum
    from atoll.aggregation.krum import MultiKrum as MultiKrum
    from atoll.aggregation.mean import Mean as Mean
    from atoll.aggregation.median import Median as Median
    from atoll.aggregation.norm_clipping import NormClipping as NormClipping
    from atoll.aggregation.outer import Adagrad as Adagrad
    from atoll.aggregation.outer import Adam as Adam
    from atoll.aggregation.outer import Momentum as Momentum
    from atoll.aggregation.outer import Nesterov as Nesterov
    from atoll.aggregation.outer import Outer as Outer
    from atoll.aggregation.outer import Sgd as Sgd
    from atoll.aggregation.outer import Yogi as Yogi
    from atoll.aggregation.rfa import GeometricMedian as GeometricMedian
    from atoll.aggregation.strategy import Strategy as Strategy
    from atoll.aggregation.testing import check_aggregator as check_aggregator
    from atoll.aggregation.testing import check_codec as check_codec
    from atoll.aggregation.testing import check_strategy as check_strategy
    from atoll.aggregation.trimmed_mean import TrimmedMean as TrimmedMean

__getattr__ = exports(
    __name__,
    {
        "FedAvg": "fedavg",
        "FedBuff": "fedbuff",
        "FedCompass": "fedcompass",
        "Strategy": "strategy",
        "check_aggregator": "testing",
        "check_codec": "testing",
        "check_strategy": "testing",
        "fedasync": "fedbuff",
        "Mean": "mean",
        "Median": "median",
        "TrimmedMean": "trimmed_mean",
        "Krum": "krum",
        "MultiKrum": "krum",
        "GeometricMedian": "rfa",
        "CenteredClipping": "centered_clipping",
        "NormClipping": "norm_clipping",
        "Outer": "outer",
        "Sgd": "outer",
        "Momentum": "outer",
        "Nesterov": "outer",
        "Adam": "outer",
        "Yogi": "outer",
        "Adagrad": "outer",
    },
)
