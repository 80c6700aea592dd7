"""Answering: a question is answered on its own line, or declined; training goes on."""

import asyncio
import hashlib
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from atoll.client.answering import Answering
from atoll.client.line import Line
from atoll.protocols import chains, messages, wire_pb2
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.codecs import as_bytes, as_tensor
from atoll.protocols.errors import ClientError, DataError, RefusedError
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.messages import Question

MANIFEST = Manifest((TensorSpec("w", (3,), "float32", "trainable"),))
MODEL = torch.tensor([1.0, 2.0, 3.0])


class Bowl:
    """0.5 * |w|^2, on 20 examples; `error` is raised in its place."""

    def __init__(self, loss: float | None = None, error: Exception | None = None) -> None:
        self.loss, self.error = loss, error
        self.judged: list[bool] = []

    def judge(
        self, model: Mapping[str, Tensor], gradient: bool, batch_statistics: bool
    ) -> tuple[float, int, Tensor | None]:
        self.judged.append(batch_statistics)
        if self.error is not None:
            raise self.error
        assert {group: values.numel() for group, values in model.items()} == {
            "trainable": 3, "buffers_float": 0, "buffers_other": 0,
        }  # fmt: skip
        w = model["trainable"]
        loss = float(0.5 * w.square().sum()) if self.loss is None else self.loss
        return loss, 20, w.clone() if gradient else None


class Odd(Bowl):
    """Returns what it likes."""

    def __init__(self, found: object) -> None:
        super().__init__()
        self.found = found

    def judge(
        self, model: Mapping[str, Tensor], gradient: bool, batch_statistics: bool
    ) -> tuple[float, int, Tensor | None]:
        return self.found  # type: ignore[return-value]


def question(number: int = 7, gradient: bool = True, inline: bool = True) -> Question:
    data = bytes(as_bytes(MODEL))
    info = BlobInfo("ask/1", 12, hashlib.sha256(data).digest(), chains.whole(MANIFEST))
    return Question(f"q{number}", info, data if inline else b"", gradient, False, 30.0)


class Fetched(Line):
    """A line whose server has the model."""

    def fetch(self, info: BlobInfo, dest: memoryview) -> None:
        dest[:] = as_bytes(MODEL)


def answered(
    bowl: Bowl, *questions: Question, line: Line | None = None, lost: bool = False
) -> list[wire_pb2.ClientMessage]:
    """What is said on the line."""
    line = line or Line(inline_limit=1000)

    async def work() -> None:
        answering = Answering("c", MANIFEST, bowl, lambda: None if lost else line)
        await asyncio.gather(*(answering.answer(line, one) for one in questions))
        answering.close()

    asyncio.run(work())
    said = []
    while (parts := line.out.peek()) is not None:
        line.out.drop()
        said.append(wire_pb2.ClientMessage.FromString(b"".join(parts)))
    return said


def test_an_answer_is_a_result_with_the_loss_and_its_gradient() -> None:
    bowl = Bowl()
    (message,) = answered(bowl, question())
    result = messages.result_from_wire(message.result)
    assert (result.question, result.order, result.update) == ("q7", "", "q7")
    assert (result.metrics, result.examples, result.final) == ({"loss": 7.0}, 20, True)
    assert torch.equal(as_tensor(memoryview(result.inline), torch.float32), MODEL)
    assert [s.group for s in result.payload.sections] == ["trainable"]
    assert bowl.judged == [False]


@pytest.mark.parametrize("inline", [True, False])
def test_where_no_gradient_is_asked_for_there_is_no_payload(inline: bool) -> None:
    asked = question(gradient=False, inline=inline)
    (message,) = answered(Bowl(), asked, asked, line=Fetched())[:1]
    assert not message.result.HasField("payload")
    assert messages.result_from_wire(message.result).payload == messages.NOTHING


@pytest.mark.parametrize(
    "bowl", [Bowl(loss=float("nan")), Odd((1.0, 20, torch.tensor([0.0, float("inf"), 0.0])))]
)
def test_of_a_model_without_a_finite_loss_it_says_no_number(bowl: Bowl) -> None:
    """It is asked again about the next: a candidate that went too far is no fault of its."""
    (message,) = answered(bowl, question())
    result = messages.result_from_wire(message.result)
    assert (result.question, result.metrics, result.payload) == ("q7", {}, messages.NOTHING)


@pytest.mark.parametrize(
    ("bowl", "code", "why"),
    [
        (Bowl(error=DataError("FL-D105", "3 examples", "")), "FL-D105", "3 examples"),
        (Bowl(error=ValueError("odd")), "FL-C104", "the trainer's validator.judge() failed"),
        (Odd(None), "FL-C104", "returned None"),
        (Odd((1.0, 0, MODEL)), "FL-C104", "gave loss=1.0 on 0 examples"),
        (Odd((1.0, 5, None)), "FL-C104", "a gradient None, not float32 (3,)"),
        (Odd((1.0, 5, MODEL.double())), "FL-C104", "a gradient torch.float64 (3,)"),
    ],
)
def test_it_declines_with_the_reason(bowl: Bowl, code: str, why: str) -> None:
    (message,) = answered(bowl, question())
    assert (message.failure.code, message.failure.question) == (code, "q7")
    assert message.failure.order == ""
    assert why in message.failure.message


@pytest.mark.parametrize(
    "error", [RefusedError("FL-W102", "closed", ""), ClientError("FL-C101", "no server", "")]
)
def test_what_is_closed_or_lost_on_the_way_is_not_declined(error: Exception) -> None:
    assert answered(Bowl(error=error), question()) == []


def test_on_a_line_that_is_gone_nothing_is_said() -> None:
    assert answered(Bowl(), question(), lost=True) == []
    assert answered(Bowl(error=ValueError("odd")), question(), lost=True) == []


def test_only_the_newest_question_is_worked_on() -> None:
    bowl = Bowl()
    said = answered(bowl, question(7), question(8))
    assert [message.result.question for message in said] == ["q8"]
    assert len(bowl.judged) == 1


def test_a_model_of_another_shape_is_declined() -> None:
    odd = BlobInfo("ask/1", 8, b"", ())
    (message,) = answered(Bowl(), Question("q7", odd, bytes(8), True))
    assert message.failure.code == "FL-W104"
