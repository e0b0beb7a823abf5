"""The part of the controller that runs rollouts.

One task per rollout that is not over reads the proxies' counters, lets `rollout` decide, and puts decisions into
force: weights and state are persisted together, before they are published. A decision that cannot be saved was not
taken, and the next reading decides again. A restarted controller goes on where the last one was; only the window that
was being counted begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from rayserve_fast.controlplane.figures import of_targets
from rayserve_fast.controlplane.proxies import within
from rayserve_fast.controlplane.rollout import Decision, Plan, Rollout, RolloutStatus, Samples
from rayserve_fast.controlplane.traffic import Traffic
from rayserve_fast.controlplane.traffic_orders import TrafficOrders
from rayserve_fast.exceptions import RayServeException

logger = logging.getLogger("ray.serve")

#: The proxies are read so often in a window and in a step, within these bounds in seconds.
READINGS = 10
SHORTEST_S = 0.05
LONGEST_S = 1.0
#: Nobody is kept waiting longer for the end of a rollout: who gave up meanwhile leaves nothing here for ever.
OVER_WAIT_S = 10.0


class RolloutOrders(TrafficOrders):
    """Methods of the controller actor; the attributes are the controller's."""

    _news: asyncio.Event
    _driving: dict[str, asyncio.Task[None]]

    async def start_rollout(self, id: str, name: str, target: str, plan: Plan) -> None:
        """Begin a rollout; `id` is the caller's, so that a repeated call begins nothing. Raises as `roll_out` does."""
        now = time.time()
        await self._order(name, lambda traffic: traffic.roll_out(id, name, target, plan, now, self._apps))
        rollout = self._traffic.rollouts.get(name)
        if rollout is not None and rollout.id == id and rollout.active and id not in self._driving:
            _log(rollout, rollout.history[0])
            self._drive(rollout)

    async def rollout_id(self, name: str) -> str:
        """Which rollout is the last one of a route or an endpoint. Raises RayServeException if there was none."""
        await self._recovered.wait()
        return self._traffic.rollout(name).id

    async def rollout_status(self, name: str, id: str) -> RolloutStatus:
        """How far the rollout is. Raises RayServeException if it is not the last one any more."""
        return (await self._rollout(name, id)).status()

    async def rollout_over(self, name: str, id: str, wait_s: float | None = None) -> RolloutStatus:
        """Its status when nothing more will be decided, or after `wait_s` or `OVER_WAIT_S`: ask again then."""
        until = time.monotonic() + min(OVER_WAIT_S, OVER_WAIT_S if wait_s is None else wait_s)
        while True:
            news = self._news
            rollout = await self._rollout(name, id)
            left = until - time.monotonic()
            if not rollout.active or left <= 0:
                return rollout.status()
            await within(left, [news.wait()])

    async def order_rollout(self, name: str, id: str, action: str) -> None:
        """Carry out `pause`, `resume` or `abort`. Raises ValueError if the rollout is over in another way."""
        rollout = replace(await self._rollout(name, id))
        order = {"pause": rollout.pause, "resume": rollout.resume, "abort": rollout.abort}[action]
        if (decision := order(time.time())) is not None:
            await self._carry_out(rollout, decision)

    def _drive_rollouts(self) -> None:
        """Go on with those of the controller before this one."""
        for rollout in self._traffic.rollouts.values():
            if rollout.active:
                self._drive(rollout)

    def _drive(self, rollout: Rollout) -> None:
        task = self._driving[rollout.id] = asyncio.ensure_future(self._watch(rollout))
        task.add_done_callback(lambda _: self._driving.pop(rollout.id, None))

    async def _watch(self, begun: Rollout) -> None:
        plan, samples = begun.plan, Samples()
        pause = max(SHORTEST_S, min(LONGEST_S, min(plan.window_s, plan.step_duration_s) / READINGS))
        step_at = begun.step_at
        while self._running(begun) is not None:
            try:
                reading = await self._fleet.traffic()
                if (rollout := self._running(begun)) is None:
                    return
                if step_at != rollout.step_at:  # a new step, whoever began it
                    step_at = rollout.step_at
                    samples.clear()
                now = time.time()
                samples.add(now, of_targets(reading, rollout.name), plan.window_s)
                if (decision := rollout.observe(now, samples.window(rollout.target))) is not None:
                    await self._carry_out(rollout, decision)
                else:
                    self._traffic.rollouts[rollout.name] = rollout
            except Exception:  # a rollout that nobody drives would stay at its step for ever
                logger.exception(f"The rollout on {begun.name} could not be judged; it is tried again.")
            await asyncio.sleep(pause)

    async def _carry_out(self, rollout: Rollout, decision: Decision) -> None:
        """Put a copy that has decided in the place of the rollout in force; raises if that cannot be saved."""

        def decide(traffic: Traffic) -> None:
            traffic.rollouts[rollout.name] = rollout
            traffic.splits[rollout.name].weights = rollout.weights()

        self._change(rollout.name, decide)
        _log(rollout, decision)
        await self._confirmed()

    def _running(self, begun: Rollout) -> Rollout | None:
        """A copy of what it is now, to decide on; None: it is over."""
        rollout = self._traffic.rollouts.get(begun.name)
        return replace(rollout) if rollout is not None and rollout.id == begun.id and rollout.active else None

    async def _rollout(self, name: str, id: str) -> Rollout:
        await self._recovered.wait()
        rollout = self._traffic.rollout(name)
        if rollout.id != id:
            raise RayServeException(
                f"This rollout on {name!r} was followed by another one, which serve.get_rollout({name!r}) returns."
            )
        return rollout


def _log(rollout: Rollout, decision: Decision) -> None:
    level = logging.WARNING if decision.action == "roll_back" else logging.INFO
    logger.log(
        level,
        f"Rollout of '{rollout.target}' on {rollout.name}: {decision.action} at a share of {decision.share:g}:"
        f" {decision.reason}.",
    )
