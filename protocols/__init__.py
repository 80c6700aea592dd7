"""What nodes say to each other, in Python and on the wire: events, actions, errors, tensors."""

from typing import TYPE_CHECKING

from atoll.protocols.lazy import exports

if TYPE_CHECKING:
    from atoll.protocols.codec_int8 import Int8 as Int8
    from atoll.protocols.codec_topk import TopK as TopK
    from atoll.protocols.errors import AtollError as AtollError
    from atoll.protocols.events import Aggregate as Aggregate
    from atoll.protocols.events import Ask as Ask
    from atoll.protocols.events import CancelTimer as CancelTimer
    from atoll.protocols.events import ClientInfo as ClientInfo
    from atoll.protocols.events import Discard as Discard
    from atoll.protocols.events import Evaluated as Evaluated
    from atoll.protocols.events import Finish as Finish
    from atoll.protocols.events import Merged as Merged
    from atoll.protocols.events import SetTimer as SetTimer
    from atoll.protocols.events import Train as Train
    from atoll.protocols.events import Update as Update

_EVENTS = (
    "Aggregate", "Ask", "CancelTimer", "ClientInfo", "Discard", "Evaluated", "Finish", "Merged",
    "SetTimer", "Train", "Update",
)  # fmt: skip

__getattr__ = exports(
    __name__,
    {
        "AtollError": "errors",
        "Int8": "codec_int8",
        "TopK": "codec_topk",
        **dict.fromkeys(_EVENTS, "events"),
    },
)
