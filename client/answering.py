"""Answering: what a client makes of models in the middle of a merge, beside its training.

A thread of its own computes the loss on what the client holds out, and sends it, with its gradient,
by the line that the question came by. Whatever goes wrong, training goes on.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from atoll.client import contract, transfer
from atoll.client.heldout import Validator
from atoll.client.line import BROKEN, Line
from atoll.protocols import messages, wire_pb2
from atoll.protocols.blobs import BlobInfo, Section
from atoll.protocols.codecs import FP32, all_finite, as_bytes
from atoll.protocols.errors import AtollError, ClientError, RefusedError
from atoll.protocols.hand import Hand
from atoll.protocols.manifest import TRAVELLING, Manifest
from atoll.protocols.messages import LOSS, NOTHING, Question, Result
from atoll.protocols.payload import check, parse
from atoll.protocols.tensors import dtype_of

logger = logging.getLogger(__name__)


class Answering:
    """`line` is the control stream of now, if there is one."""

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        validator: Validator,
        line: Callable[[], Line | None],
    ) -> None:
        self._name, self._manifest, self._validator = name, manifest, validator
        self._line = line
        self._hand = Hand("validate")
        self._model = memoryview(b"")  # room for one that has to be fetched
        self._newest = ""  # question heard; an older one is void

    async def answer(self, line: Line, question: Question) -> None:
        """Answer, or decline with the reason."""
        self._newest = question.id
        try:
            result = await self._hand.do(partial(self._work, line, question))
        except AtollError as error:
            self._failed(line, question, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a user's validator may raise anything; training goes on
            logger.exception("client=%s question=%s failed", self._name, question.id)
            self._failed(line, question, ClientError("FL-S100", f"unexpected error: {error!r}"))
        else:
            if result is not None and self._line() is line:
                line.say(result=messages.result_to_wire(result))

    def close(self) -> None:
        self._hand.close(wait=False)

    def _failed(self, line: Line, question: Question, error: AtollError) -> None:
        if isinstance(error, RefusedError) or error.code in BROKEN or self._line() is not line:
            logger.info("client=%s question=%s not answered: %s", self._name, question.id, error)
            return  # it is closed, or will be put again
        logger.warning("client=%s judges no models: %s", self._name, error)
        line.say(
            failure=wire_pb2.Failure(code=error.code, message=error.message, question=question.id)
        )

    def _work(self, line: Line, question: Question) -> Result | None:
        """In the thread. What is left to be said on the line; None: it was uploaded, or is void."""
        if self._newest != question.id:
            return None
        info, view = question.model, memoryview(question.inline)
        if not question.inline:
            view = self._room(info)
            line.fetch(info, view)
        model = parse(self._manifest, info.sections, view, FP32, "model")
        groups: dict[str, Tensor] = {
            g: model.read(g) if model.has(g) else torch.empty(0, dtype=dtype_of(g))
            for g in TRAVELLING
        }
        loss, examples, slope = contract.judge(
            self._validator, groups, question.gradient, question.batch_statistics
        )
        result = Result("", 0, 0, examples, 0.0, NOTHING, question=question.id)
        if not math.isfinite(loss) or (slope is not None and not all_finite(slope)):
            return result  # of such a model there is nothing to say; the next may be another
        result = replace(result, metrics={LOSS: loss})
        return result if slope is None else self._with(line, result, as_bytes(slope))

    def _room(self, info: BlobInfo) -> memoryview:
        """For a model. RemoteError FL-W104 where it cannot be one."""
        check(self._manifest, info.sections, info.size, FP32, "model")
        if len(self._model) != info.size:
            self._model = memoryview(bytearray(info.size))
        return self._model

    def _with(self, line: Line, result: Result, gradient: memoryview) -> Result | None:
        """The answer with its gradient inside, or None where that has been uploaded."""
        section = Section("trainable", FP32.name, len(gradient) // 4, len(gradient))
        info = BlobInfo(f"u/{result.question}", len(gradient), b"", (section,))
        if len(gradient) <= line.inline_limit:
            return replace(result, payload=info, inline=bytes(gradient))
        whole = replace(result, payload=info)
        transfer.upload(line.bulk, line.token, line.run, whole, gradient, line.patience)
        return None
