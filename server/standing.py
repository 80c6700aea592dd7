"""Standing: where a run stands, as its server tells whoever asks, and how it ended."""

from dataclasses import asdict

from atoll.server.host import Host
from atoll.server.outgoing import Traffic
from atoll.server.rules import Rules
from atoll.server.run import Order, Run
from atoll.server.server import Summary
from atoll.server.sessions import Session
from atoll.server.spec import RunSpec
from atoll.server.totals import Totals


def status(
    spec: RunSpec, host: Host, rules: Rules, history: Totals, now: float
) -> dict[str, object]:
    """The fields of a `server/status.py` `Status`, as plain data. `now`: on the run's clock."""
    run = host.run
    groups = getattr(run.strategy, "groups", None)
    return {
        "run": spec.id,
        "name": spec.name,
        "strategy": spec.strategy,
        "state": "finished" if run.finished else "running",
        "reason": run.finished or "",
        "version": run.published,
        "updates": run.updates_used,
        "steps": run.steps_used,
        "elapsed_s": round(now, 3),
        "metric": rules.metric,
        "target": rules.target,
        "latest": rules.latest,
        "latest_version": None if rules.latest is None else rules.latest_version,
        "best": rules.best,
        "best_version": rules.best_version,
        "epsilon": history.epsilon,
        "clients": _clients(host, history, now),
        "groups": [list(g) if isinstance(g, tuple) else asdict(g) for g in groups(now)]
        if groups
        else [],
    }


def _clients(host: Host, history: Totals, now: float) -> list[dict[str, object]]:
    sent, told = host.outgoing.traffic, []
    for m in host.membership.members.values():
        order, session = host.run.open.get(m.name), host.sessions.of.get(m.name)
        totals, traffic = history.clients.get(m.name), sent.get(m.name, Traffic())
        told.append({
            "name": m.name,
            "state": m.standing,
            "reason": m.reason,
            "since_s": round(now - m.since, 3),
            "heard_s": round(now - m.heard, 3),
            "seconds_per_step": m.seconds_per_step,
            "order": order.id if order is not None else None,
            "steps": order.steps if order is not None else None,
            "step": _done(order, session) if session is not None else None,
            "updates": totals.updates if totals is not None else 0,
            "bytes_up": traffic.up,
            "bytes_down": traffic.down,
        })  # fmt: skip
    return told


def _done(order: Order | None, session: Session) -> int:
    """Steps of this order: what was said of the one before tells nothing of it."""
    named, step = session.beat
    return min(step, order.steps) if order is not None and named == order.id else 0


def summary(spec: RunSpec, run: Run, rules: Rules, history: Totals, now: float) -> Summary:
    # Waiting for clients after the end of the run is not part of it.
    seconds = now if history.ended is None else history.ended
    return Summary(
        spec.id, run.finished or "", run.published, run.updates_used, run.steps_used, seconds,
        rules.best_metrics, rules.best_version, rules.reached_at,
    )  # fmt: skip
