from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClientMessage(_message.Message):
    __slots__ = ("hello", "heartbeat", "result", "ack", "evaluation", "failure", "goodbye", "relay", "more")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    result: Result
    ack: Ack
    evaluation: Evaluation
    failure: Failure
    goodbye: Goodbye
    relay: Relay
    more: _containers.RepeatedCompositeFieldContainer[ClientMessage]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., relay: _Optional[_Union[Relay, _Mapping]] = ..., more: _Optional[_Iterable[_Union[ClientMessage, _Mapping]]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "heartbeat", "order", "ask", "receipt", "outcome", "evaluate", "refusal", "goodbye", "question", "relay", "more")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    heartbeat: Heartbeat
    order: Order
    ask: Ask
    receipt: Receipt
    outcome: Outcome
    evaluate: Evaluate
    refusal: Refusal
    goodbye: Goodbye
    question: Question
    relay: Relay
    more: _containers.RepeatedCompositeFieldContainer[ServerMessage]
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., order: _Optional[_Union[Order, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., question: _Optional[_Union[Question, _Mapping]] = ..., relay: _Optional[_Union[Relay, _Mapping]] = ..., more: _Optional[_Iterable[_Union[ServerMessage, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "run", "client", "node", "examples", "seconds_per_step", "capabilities", "schema", "holding", "version", "kept", "up_codec", "down_codec", "base")
    class KeptEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    UP_CODEC_FIELD_NUMBER: _ClassVar[int]
    DOWN_CODEC_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    run: str
    client: str
    node: str
    examples: int
    seconds_per_step: float
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    schema: str
    holding: _containers.RepeatedScalarFieldContainer[str]
    version: str
    kept: _containers.ScalarMap[str, int]
    up_codec: str
    down_codec: str
    base: str
    def __init__(self, protocol: _Optional[int] = ..., run: _Optional[str] = ..., client: _Optional[str] = ..., node: _Optional[str] = ..., examples: _Optional[int] = ..., seconds_per_step: _Optional[float] = ..., capabilities: _Optional[_Iterable[str]] = ..., schema: _Optional[str] = ..., holding: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., kept: _Optional[_Mapping[str, int]] = ..., up_codec: _Optional[str] = ..., down_codec: _Optional[str] = ..., base: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("run", "session", "chunk_bytes", "inline_limit", "lease_seconds", "heartbeat_seconds", "up_codec", "down_codec", "spec", "manifest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    INLINE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UP_CODEC_FIELD_NUMBER: _ClassVar[int]
    DOWN_CODEC_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    session: str
    chunk_bytes: int
    inline_limit: int
    lease_seconds: float
    heartbeat_seconds: float
    up_codec: str
    down_codec: str
    spec: str
    manifest: str
    def __init__(self, run: _Optional[str] = ..., session: _Optional[str] = ..., chunk_bytes: _Optional[int] = ..., inline_limit: _Optional[int] = ..., lease_seconds: _Optional[float] = ..., heartbeat_seconds: _Optional[float] = ..., up_codec: _Optional[str] = ..., down_codec: _Optional[str] = ..., spec: _Optional[str] = ..., manifest: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("order", "step")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    order: str
    step: int
    def __init__(self, order: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("id", "attempt", "version", "steps", "model", "extra", "base_encoding", "deadline_seconds", "extras", "differences")
    class ExtraEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    BASE_ENCODING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    id: str
    attempt: int
    version: int
    steps: int
    model: Blob
    extra: _containers.ScalarMap[str, float]
    base_encoding: str
    deadline_seconds: float
    extras: _containers.RepeatedCompositeFieldContainer[Blob]
    differences: _containers.RepeatedCompositeFieldContainer[Blob]
    def __init__(self, id: _Optional[str] = ..., attempt: _Optional[int] = ..., version: _Optional[int] = ..., steps: _Optional[int] = ..., model: _Optional[_Union[Blob, _Mapping]] = ..., extra: _Optional[_Mapping[str, float]] = ..., base_encoding: _Optional[str] = ..., deadline_seconds: _Optional[float] = ..., extras: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., differences: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("order", "then")
    class Then(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CONTINUE: _ClassVar[Ask.Then]
        SEND: _ClassVar[Ask.Then]
        DROP: _ClassVar[Ask.Then]
    CONTINUE: Ask.Then
    SEND: Ask.Then
    DROP: Ask.Then
    ORDER_FIELD_NUMBER: _ClassVar[int]
    THEN_FIELD_NUMBER: _ClassVar[int]
    order: str
    then: Ask.Then
    def __init__(self, order: _Optional[str] = ..., then: _Optional[_Union[Ask.Then, str]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("order", "attempt", "steps", "examples", "train_seconds", "metrics", "final", "payload", "snapshot", "question")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    order: str
    attempt: int
    steps: int
    examples: int
    train_seconds: float
    metrics: _containers.ScalarMap[str, float]
    final: bool
    payload: Blob
    snapshot: int
    question: str
    def __init__(self, order: _Optional[str] = ..., attempt: _Optional[int] = ..., steps: _Optional[int] = ..., examples: _Optional[int] = ..., train_seconds: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., final: bool = ..., payload: _Optional[_Union[Blob, _Mapping]] = ..., snapshot: _Optional[int] = ..., question: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("order", "update", "final")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    order: str
    update: str
    final: bool
    def __init__(self, order: _Optional[str] = ..., update: _Optional[str] = ..., final: bool = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("order", "fate", "version", "reason", "update")
    class Fate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        USED: _ClassVar[Outcome.Fate]
        DISCARDED: _ClassVar[Outcome.Fate]
        SUPERSEDED: _ClassVar[Outcome.Fate]
    USED: Outcome.Fate
    DISCARDED: Outcome.Fate
    SUPERSEDED: Outcome.Fate
    ORDER_FIELD_NUMBER: _ClassVar[int]
    FATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    order: str
    fate: Outcome.Fate
    version: int
    reason: str
    update: str
    def __init__(self, order: _Optional[str] = ..., fate: _Optional[_Union[Outcome.Fate, str]] = ..., version: _Optional[int] = ..., reason: _Optional[str] = ..., update: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, updates: _Optional[_Iterable[str]] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("version", "model", "base_encoding", "differences")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_ENCODING_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    version: int
    model: Blob
    base_encoding: str
    differences: _containers.RepeatedCompositeFieldContainer[Blob]
    def __init__(self, version: _Optional[int] = ..., model: _Optional[_Union[Blob, _Mapping]] = ..., base_encoding: _Optional[str] = ..., differences: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("version", "metrics", "examples")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    version: int
    metrics: _containers.ScalarMap[str, float]
    examples: int
    def __init__(self, version: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., examples: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("order", "code", "message", "question")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    order: str
    code: str
    message: str
    question: str
    def __init__(self, order: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., question: _Optional[str] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("id", "model", "gradient", "batch_statistics", "deadline_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    BATCH_STATISTICS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: Blob
    gradient: bool
    batch_statistics: bool
    deadline_seconds: float
    def __init__(self, id: _Optional[str] = ..., model: _Optional[_Union[Blob, _Mapping]] = ..., gradient: bool = ..., batch_statistics: bool = ..., deadline_seconds: _Optional[float] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message", "hint", "fatal", "retry_seconds", "order")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    FATAL_FIELD_NUMBER: _ClassVar[int]
    RETRY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    hint: str
    fatal: bool
    retry_seconds: float
    order: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., fatal: bool = ..., retry_seconds: _Optional[float] = ..., order: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "done", "retry_seconds")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    RETRY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    done: bool
    retry_seconds: float
    def __init__(self, reason: _Optional[str] = ..., done: bool = ..., retry_seconds: _Optional[float] = ...) -> None: ...

class Relay(_message.Message):
    __slots__ = ("channel", "data")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    channel: str
    data: bytes
    def __init__(self, channel: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Section(_message.Message):
    __slots__ = ("group", "codec", "count", "length")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    group: str
    codec: str
    count: int
    length: int
    def __init__(self, group: _Optional[str] = ..., codec: _Optional[str] = ..., count: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("id", "size", "sha256", "sections", "inline", "pad")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    PAD_FIELD_NUMBER: _ClassVar[int]
    id: str
    size: int
    sha256: bytes
    sections: _containers.RepeatedCompositeFieldContainer[Section]
    inline: bytes
    pad: bytes
    def __init__(self, id: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[bytes] = ..., sections: _Optional[_Iterable[_Union[Section, _Mapping]]] = ..., inline: _Optional[bytes] = ..., pad: _Optional[bytes] = ...) -> None: ...

class BlobRequest(_message.Message):
    __slots__ = ("run", "blob", "offset")
    RUN_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    run: str
    blob: str
    offset: int
    def __init__(self, run: _Optional[str] = ..., blob: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("blob", "offset", "crc32", "last", "sha256", "data")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    blob: str
    offset: int
    crc32: int
    last: bool
    sha256: bytes
    data: bytes
    def __init__(self, blob: _Optional[str] = ..., offset: _Optional[int] = ..., crc32: _Optional[int] = ..., last: bool = ..., sha256: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadOpen(_message.Message):
    __slots__ = ("run", "result")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    run: str
    result: Result
    def __init__(self, run: _Optional[str] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class UploadState(_message.Message):
    __slots__ = ("blob", "offset", "committed")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    blob: str
    offset: int
    committed: bool
    def __init__(self, blob: _Optional[str] = ..., offset: _Optional[int] = ..., committed: bool = ...) -> None: ...

class UploadCommit(_message.Message):
    __slots__ = ("run", "result")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    run: str
    result: Result
    def __init__(self, run: _Optional[str] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("what", "arguments")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    what: str
    arguments: str
    def __init__(self, what: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: str
    def __init__(self, data: _Optional[str] = ...) -> None: ...
