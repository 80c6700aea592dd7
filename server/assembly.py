"""Assembly: all parts of one run put together, fresh or as they were left."""

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from atoll.aggregation.aggregator import Aggregator, aggregator
from atoll.aggregation.outer import Outer, outer
from atoll.aggregation.strategy import Strategy
from atoll.client.algorithm import local_algorithm
from atoll.client.contract import Judge
from atoll.client.heldout import SHARE
from atoll.client.models import manifest_of
from atoll.protocols import slots as slot
from atoll.protocols import state
from atoll.protocols.errors import ServerError, UsageError
from atoll.protocols.events import Evaluated
from atoll.protocols.manifest import Manifest
from atoll.protocols.membership import Membership
from atoll.protocols.tensors import extra_sections, sections_of
from atoll.server import standing
from atoll.server.buffers import Buffers
from atoll.server.check import mixed
from atoll.server.clock import Clock
from atoll.server.driver import Driver
from atoll.server.evaluate import Evaluator
from atoll.server.host import Host
from atoll.server.joint import Group, JointMerger
from atoll.server.journal import Journal
from atoll.server.links import Links
from atoll.server.merge import Merger
from atoll.server.momenta import suited
from atoll.server.past import Past
from atoll.server.privacy import Privacy
from atoll.server.questions import Questions
from atoll.server.recover import Recovered, recover
from atoll.server.rules import LIMITS, Rules
from atoll.server.run import Run
from atoll.server.secret import key_of, privacy_of
from atoll.server.server import Summary
from atoll.server.spec import STRATEGIES, RunSpec
from atoll.server.table import table_of
from atoll.server.totals import Row, Totals
from atoll.server.uploads import Uploads, order_of
from atoll.server.versions import VersionStore
from atoll.server.workshop import Stock, Workshop

logger = logging.getLogger(__name__)

FLUSH = 0.1  # seconds a row of the history may wait for the disk
MOST_LINES = 500  # of the history, in one answer


class Assembly:
    """Built in a worker thread; `begin`, `end` in the loop's; `close` in a worker thread again."""

    def __init__(
        self,
        spec: RunSpec,
        folder: Path,
        rules: Rules,
        uploads: Uploads,
        slots: Mapping[str, object],
        init: Path | None,
        on_row: Callable[[dict[str, object]], None] | None,
    ) -> None:
        torch.set_num_threads(1)  # the merge brings its own threads
        self.spec, self.folder, self.slots = spec, folder, slots
        strategy = self._strategy()
        module, judge = self._model_and_judge()
        self.manifest: Manifest = manifest_of(module)
        self.questions = Questions(self.manifest, spec.most_examples)
        self.store = VersionStore(folder / "versions", self.manifest)
        merger = self._merger(strategy, module)
        parts = {"strategy": strategy, "aggregator": merger.aggregator, "outer": merger.outer}
        for warning in mixed(spec, None, parts):
            logger.warning("run=%s %s", spec.id, warning)
        self.links = Links.of(spec, self.store, folder / "chains")
        self.workshop = Workshop(self.store, merger, uploads, self.links.codecs, spec.keep)
        self.journal = Journal(folder / "journal.sqlite", spec.id)
        self.resumed = self.journal.seq > 0 or bool(self.store.numbers())
        membership = Membership(lease=spec.lease)
        past: Past | None = None
        try:
            if not self.resumed:
                self._first_version(module, init or (Path(spec.init) if spec.init else None))
            self._limits(rules)
            past = self._past(folder / "history.jsonl")
            found = recover(self.journal, strategy, rules, membership, past.heard)
            self._restore(found, uploads)
            self._look_at(past.history, found.run.published)
        except BaseException as error:
            self.journal.abandon()
            if past is not None:
                past.ledger.close()
            if isinstance(error, OSError):
                raise _unwritten(error) from error
            raise
        self.history, self.ledger = past.history, past.ledger
        self._on_row = on_row
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flushing: asyncio.TimerHandle | None = None
        self.evaluator = self._evaluator(judge)
        known = self.workshop, self.links, self.history, self.evaluator, self._note, self.questions
        self.host = Host(spec, found.run, membership, *known)
        self.host.recorder = past.recorder
        self.clock = Clock(found.now)
        self.driver = Driver(found.run, self.journal, self.host, found.rules, self.clock)
        self.driver.snapshot = self._snapshot
        self.host.driver = self.driver

    # ---- parts ---------------------------------------------------------------------------------

    def _strategy(self) -> Strategy:
        made = self.slots.get("strategy")
        made = slot.resolve("strategy", self.spec.strategy, STRATEGIES) if made is None else made
        if not isinstance(made, Strategy):
            raise UsageError(
                "FL-S102",
                f"strategy {self.spec.strategy!r} is a {type(made).__name__}",
                "derive it from atoll.aggregation.Strategy",
            )
        return made

    def _merger(self, strategy: Strategy, module: torch.nn.Module) -> Merger:
        if (group := self.slots.get("group")) is not None:
            return JointMerger(self.manifest, outer(self.spec.outer), cast("Group", group))
        half = local_algorithm(self.spec.algorithm).server_half()
        count = self.manifest.counts["trainable"]
        return Merger(
            self.manifest,
            self._aggregator(module),
            cast(
                "Outer",
                self.slots.get("outer") or outer(suited(self.spec.outer, self.spec.algorithm)),
            ),
            cast("Buffers", self.spec.buffers),
            privacy=self._privacy(strategy),
            half=half,
            table=table_of(half, count, self.folder / "rows"),
        )

    def _privacy(self, strategy: Strategy) -> Privacy | None:
        if not self.spec.dp:
            return None
        begun = bool(self.store.numbers())
        return privacy_of(self.spec, strategy, key_of(self.folder, begun))

    def _model_and_judge(self) -> tuple[torch.nn.Module, Judge | None]:
        from atoll.server.judge import build

        return build(self.spec, self.slots)

    def _aggregator(self, module: torch.nn.Module) -> Aggregator:
        from atoll.server.judge import data_of
        from atoll.server.learner import asking, learning, validated

        made = cast("Aggregator", self.slots.get("aggregator") or aggregator(self.spec.aggregator))
        proxy = self.slots.get("proxy") or self.spec.proxy
        run = data_of(self.spec, self.slots) if proxy else None
        rule = learning(made, module, proxy, run, self.spec.seed, self.spec.aggregator)
        if (asks := validated(rule)) is None:
            return rule
        self.questions.ask_for(asks)
        return asking(asks, self.manifest.counts["trainable"], self.questions)

    @property
    def share(self) -> float:
        """Of their examples that clients are to hold out, to judge models by."""
        return SHARE if self.questions.wanted else 0.0

    def _first_version(self, module: torch.nn.Module, init: Path | None) -> None:
        if init is not None:
            first = self.store.initial_from(init)
        else:
            first = self.store.initial(module.state_dict())
        self.store.save(first)

    def _limits(self, rules: Rules) -> None:
        """Limits that were not given this time are those of the last."""
        told = self.journal.meta("limits")
        former = (
            state.load(Rules, {**self.spec.limits}) if told is None else state.loads(Rules, told)
        )
        if rules.target is None and rules.metric == Rules.metric:
            rules.metric = former.metric
        for name in LIMITS:
            if getattr(rules, name) is None:
                setattr(rules, name, getattr(former, name))
        self.journal.note("limits", state.dumps(rules))

    def _say_limits(self) -> None:
        """For whoever reads the history without us."""
        rules = self.driver.rules
        limits = {n: v for n in LIMITS if (v := getattr(rules, n)) is not None}
        if len(limits) == 1:  # the metric alone is no limit
            limits = {}
        if limits != self.history.limits and self.history.finished is None:
            row: dict[str, object] = {"t": self.clock.now(), "kind": "limits", **limits}
            self.history.append(row)
            self._note([row])

    def _restore(self, found: Recovered, uploads: Uploads) -> None:
        """Take up kept updates, make unsaved versions again; the rest is forgotten."""
        run: Run = found.run
        payloads = list(self.journal.payloads())
        there = {payload.id for payload in payloads}
        again = [m for m in found.stock.merges if there.issuperset(u for u, _ in m.items)]
        newest = self._newest(run.published, {m.version for m in again})
        merges = [m for m in found.stock.merges if m.version > newest]
        keep = set(run.held) | {update for merge in merges for update, _ in merge.items}
        gone = []
        for payload in payloads:
            if payload.id not in keep:
                gone.append(payload.id)
                continue
            self.workshop.infos[payload.id] = payload.info
            if payload.data is not None:
                if payload.data:
                    uploads.keep(payload.id, payload.data)
            else:
                uploads.restore(payload.id, payload.info.size, payload.info.sha256)
        awaited = run.awaited()
        uploads.sweep(keep | {u for u in uploads.names() if order_of(u) in awaited})
        self.journal.append([], forget=gone)
        self.workshop.stock = Stock([m for m in merges if m.version <= run.published])
        self._redo = [m for m in merges if m.version > run.published]
        if (table := self.workshop.merger.table) is not None:
            table.roll_back(self.store.open(newest).facts.numbers)
        self.workshop.rebuild(self.workshop.stock.merges)
        self.workshop.best = found.rules.best_version

    def _look_at(self, history: Totals, published: int) -> None:
        """What was cut off before the last snapshot does not come again: say so."""
        if history.versions < published:
            logger.warning(
                "run=%s history.jsonl tells of %d versions of %d: it was cut or moved away; the "
                "run itself is whole", self.spec.id, history.versions, published,
            )  # fmt: skip

    def _newest(self, published: int, again: Collection[int]) -> int:
        """The newest whole version on disk that the journal knows of (a later one was made when the
        process died, and is made again), with all versions after it among those that can be made
        `again`. Damaged ones are set aside."""
        damage = ""
        for number in reversed(self.store.saved()):
            if number > published or not set(range(number + 1, published + 1)).issubset(again):
                continue
            try:
                version = self.store.open(number)
                if (table := self.workshop.merger.table) is not None:
                    table.check(version.facts.numbers)
                return number
            except ServerError as error:
                damage = damage or f": {error.message}"
        raise ServerError(
            "FL-S206", f"no whole version in {self.folder}{damage}", "restore it from a backup"
        )

    def _evaluator(self, judge: Judge | None) -> Evaluator | None:
        if judge is None:
            return None

        def report(version: int, metrics: Mapping[str, float]) -> None:
            self.driver.post_threadsafe(Evaluated(version, metrics))

        def failed(version: int) -> None:
            self.host.unjudged(version)

        def read(version: int) -> Mapping[str, torch.Tensor]:
            return self.workshop.pin(version).tensors()

        return Evaluator(judge, read, report, failed)

    # ---- history -------------------------------------------------------------------------------

    def _past(self, path: Path) -> Past:
        snapshot = self.journal.last_snapshot()
        codecs, allowed = self.links.codecs, self.links.allowed  # of most clients
        ways = (codecs[allowed.up[0]], codecs[allowed.down[0]])
        up, down = (sum(s.length for s in sections_of(self.manifest, way)) for way in ways)
        up += sum(s.length for s in extra_sections(self.workshop.extras.up))
        down += sum(s.length for s in extra_sections(self.workshop.extras.down))
        replayed = snapshot[1] if snapshot else -math.inf
        return Past(path, replayed, (up, down), self.journal.last())

    def _note(self, rows: Sequence[Row]) -> None:
        """Rows for the history's file and whoever listens."""
        self.ledger.extend(rows)
        if self._flushing is None and self._loop is not None:
            self._flushing = self._loop.call_later(FLUSH, self._in_time)
        if self._on_row is not None:
            for row in rows:
                self._on_row(dict(row))

    def _in_time(self) -> None:
        self._flushing = None
        self._flush()

    def _flush(self) -> None:
        """Many rows at once; where the disk does not take them, the run stops."""
        try:
            self.ledger.flush()
        except OSError as error:
            self.driver.fail(_unwritten(error))

    def _snapshot(self) -> str | None:
        """The rows before it do not come again from the journal: they go to the file first."""
        self._flush()
        return None if self.driver.error is not None else self.host.snapshot()

    async def lines(self, after: int, seconds: float) -> dict[str, object]:
        """Rows from number `after` on, at most MOST_LINES; waits so long where there is none."""
        await self.ledger.news(after, seconds)
        return {"lines": self.ledger.lines(after, MOST_LINES), "total": len(self.ledger)}

    # ---- life ----------------------------------------------------------------------------------

    async def begin(self) -> None:
        self.clock.start()
        self._loop = asyncio.get_running_loop()
        self.driver.attach()
        if self.resumed and self.history.finished is None:
            now, version = self.clock.now(), self.host.run.published
            self._note([{"t": now, "kind": "resumed", "version": version}])
        self._say_limits()
        if self.driver.rules.latest_version < self.host.run.published or not self.resumed:
            self.host.evaluate(self.host.run.published)  # its evaluation died with the process
        self.host.listen()
        for merge in self._redo:
            self.host.merge(merge)
        self.host.begin()

    async def end(self, over: bool) -> None:
        """Goodbye to the clients; `over`: for good."""
        reason = self.host.run.finished if over else "the server stops for now"
        self.host.reception.farewell(reason or "", over, retry_seconds=1.0)
        await self.host.close()
        self._loop = None  # rows that still come are written by `close`, in its thread
        if self._flushing is not None:
            self._flushing.cancel()

    def close(self) -> None:
        try:
            self._flush()
            self.ledger.close()
            if self.host.reception.dismiss():
                self.journal.note("membership", state.dumps(self.host.membership))
        finally:
            self.journal.close()

    def export(self, path: Path) -> Path:
        """The best version, or the newest where none was evaluated, as a safetensors file."""
        number = self.driver.rules.best_version
        kept = self.store.numbers()
        version = self.store.open(number if number is not None and number in kept else kept[-1])
        self.store.export(version, path)
        return path

    def summary(self) -> Summary:
        return standing.summary(
            self.spec, self.host.run, self.driver.rules, self.history, self.clock.now()
        )

    def status(self) -> dict[str, object]:
        """What `fl-server status` and `run show` print."""
        return standing.status(
            self.spec, self.host, self.driver.rules, self.history, self.clock.now()
        )


def _unwritten(error: OSError) -> ServerError:
    what = f"the history cannot be written: {error.strerror}"
    return ServerError("FL-S203", what, "free space on its disk and start again")
