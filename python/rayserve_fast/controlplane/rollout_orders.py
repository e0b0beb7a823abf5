"""The part of the controller that runs rollouts.

One task per rollout that is not over reads the proxies' counters, lets `rollout` decide, and puts decisions into
force: weights and state are persisted together, before they are published. A restarted controller goes on where the
last one was; only the window that was being counted begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import time

from rayserve_fast.controlplane.figures import of_targets
from rayserve_fast.controlplane.rollout import Decision, Plan, Rollout, RolloutStatus, Samples
from rayserve_fast.controlplane.traffic_orders import TrafficOrders
from rayserve_fast.exceptions import RayServeException

logger = logging.getLogger("ray.serve")

#: The proxies are read so often in a window and in a step, within these bounds in seconds.
READINGS = 10
SHORTEST_S = 0.05
LONGEST_S = 1.0


class RolloutOrders(TrafficOrders):
    """Methods of the controller actor; the attributes are the controller's."""

    _news: asyncio.Event
    _driving: dict[str, asyncio.Task[None]]

    async def start_rollout(self, id: str, name: str, target: str, plan: Plan) -> None:
        """Begin a rollout; `id` is the caller's, so that a repeated call begins nothing. Raises as `roll_out` does."""
        await self._recovered.wait()
        rollout = self._traffic.roll_out(id, name, target, plan, time.time(), self._apps)
        await self._take_effect()
        if rollout.active and id not in self._driving:
            _log(rollout, rollout.history[0])
            self._drive(rollout)

    async def rollout_id(self, name: str) -> str:
        """Which rollout is the last one of a route or an endpoint. Raises RayServeException if there was none."""
        await self._recovered.wait()
        return self._traffic.rollout(name).id

    async def rollout_status(self, name: str, id: str) -> RolloutStatus:
        """How far the rollout is. Raises RayServeException if it is not the last one any more."""
        return (await self._rollout(name, id)).status()

    async def rollout_over(self, name: str, id: str) -> RolloutStatus:
        """Wait until nothing more will be decided."""
        while True:
            news = self._news
            if not (rollout := await self._rollout(name, id)).active:
                return rollout.status()
            await news.wait()

    async def order_rollout(self, name: str, id: str, action: str) -> None:
        """Carry out `pause`, `resume` or `abort`. Raises ValueError if the rollout is over in another way."""
        rollout = await self._rollout(name, id)
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

    async def _watch(self, rollout: Rollout) -> None:
        plan, samples = rollout.plan, Samples()
        pause = max(SHORTEST_S, min(LONGEST_S, min(plan.window_s, plan.step_duration_s) / READINGS))
        step_at = rollout.step_at
        while rollout.active:
            try:
                reading = await self._fleet.traffic()
                if step_at != rollout.step_at:  # a new step, whoever began it
                    step_at = rollout.step_at
                    samples.clear()
                now = time.time()
                samples.add(now, of_targets(reading, rollout.name), plan.window_s)
                if (decision := rollout.observe(now, samples.window(rollout.target))) is not None:
                    await self._carry_out(rollout, decision)
            except Exception:  # a rollout that nobody drives would stay at its step for ever
                logger.exception(f"The rollout on {rollout.name} could not be judged; it is tried again.")
            await asyncio.sleep(pause)

    async def _carry_out(self, rollout: Rollout, decision: Decision) -> None:
        _log(rollout, decision)
        self._traffic.splits[rollout.name].weights = rollout.weights()
        await self._take_effect()

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
