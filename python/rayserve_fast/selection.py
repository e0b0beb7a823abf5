"""Calls whose replica is not left to the router: `handle.broadcast`, `handle.choose_replica` and `dispatch`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayserve_fast.exceptions import DeploymentUnavailableError, RayServeException

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rayserve_fast._core import Reservation
    from rayserve_fast.caller import Caller
    from rayserve_fast.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
    from rayserve_fast.routing import Told

#: How long the replicas of a deployment that this process has never called may take to be known, seconds.
KNOWN_S = 10.0
#: Pauses while there is no room, or nothing known: first and longest, seconds.
PAUSES_S = (0.005, 0.1)


class DeploymentBroadcastResponse:
    """The answers of all replicas to one call; made by `DeploymentHandle.broadcast`.

    Args:
        handle: with the method to call.
        args, kwargs: what it is called with.
    """

    def __init__(self, handle: DeploymentHandle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = handle, args, kwargs
        self._responses: list[DeploymentResponse] | None = None
        self._coming: Future[list[Told]] | None = None
        if handle._local:  # the one replica there is
            self._responses = [handle.remote(*args, **kwargs)]  # type: ignore[list-item]
            return
        owner = _owner(handle)
        known = owner.chooser.replicas(handle._key)
        if known and known[0]:
            self._send(known[0])
        else:
            self._coming = owner.routers.submit(_replicas(handle, owner))

    def results(self, *, timeout_s: float | None = None, return_exceptions: bool = False) -> list[Any]:
        """Wait for all answers.

        Args:
            timeout_s: seconds for all of them together; None: as long as it takes.
            return_exceptions: put what a replica raises into the list, instead of raising the first such.

        Returns:
            The answers, in no order.

        Raises:
            TimeoutError: some are not there in time.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s

        def left() -> float | None:
            return None if until is None else max(0.0, until - time.monotonic())

        if self._responses is None:
            self._refuse_loop()
            assert self._coming is not None, "either sent or waiting"
            try:
                self._send(self._coming.result(left()))
            except concurrent.futures.TimeoutError:
                raise TimeoutError("The replicas are not known yet.") from None
        answers = []
        for response in self._responses or ():
            try:
                answers.append(response.result(timeout_s=left()))
            except TimeoutError:
                raise
            except Exception as error:
                if not return_exceptions:
                    raise
                answers.append(error)
        return answers

    async def results_async(self, *, timeout_s: float | None = None, return_exceptions: bool = False) -> list[Any]:
        """The same for code in an event loop."""
        try:
            return await asyncio.wait_for(self._gather(return_exceptions), timeout_s)
        except asyncio.TimeoutError:
            raise TimeoutError(f"Not all replicas have answered within {timeout_s} s.") from None

    async def _gather(self, return_exceptions: bool) -> list[Any]:
        if self._responses is None:
            assert self._coming is not None, "either sent or waiting"
            self._send(await asyncio.wrap_future(self._coming))
        responses = [_answer(response) for response in self._responses or ()]
        return list(await asyncio.gather(*responses, return_exceptions=return_exceptions))

    def _send(self, told: list[Told]) -> None:
        handle, args, kwargs = self._call
        self._responses = [handle._aimed(one[0]).remote(*args, **kwargs) for one in told]  # type: ignore[misc]

    def _refuse_loop(self) -> None:
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(
                "Sync methods should not be called from within an `asyncio` event loop. Use `results_async` instead."
            )


@dataclass(eq=False)
class ReplicaSelection:
    """A replica that the router has chosen, with a slot reserved; see `DeploymentHandle.choose_replica`."""

    replica_id: str
    node_ip: str
    port: int | None
    node_id: str
    availability_zone: str | None = None
    replica_metadata: dict[str, Any] = field(default_factory=dict)
    _handle: Any = field(default=None, repr=False)
    _reservation: Reservation | None = field(default=None, repr=False)
    _dispatched: bool = field(default=False, repr=False)
    _left: bool = field(default=False, repr=False)  # its context has ended, and the slot is somebody else's

    @property
    def address(self) -> str:
        """Host and port of the replica."""
        return f"{self.node_ip}:{self.port}"

    def to_dict(self) -> dict[str, Any]:
        """Everything public, as plain values."""
        names = ("replica_id", "node_ip", "port", "node_id", "availability_zone", "replica_metadata")
        return {name: getattr(self, name) for name in names}

    def _dispatch(
        self, handle: DeploymentHandle, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> DeploymentResponse | DeploymentResponseGenerator:
        if handle.deployment_id != self._handle.deployment_id:
            raise ValueError(
                f"The replica {self.replica_id} was chosen for {self._handle.deployment_id}, "
                f"not for {handle.deployment_id}."
            )
        if self._dispatched:
            raise RuntimeError(
                f"ReplicaSelection for {self.replica_id} has already been dispatched. "
                "Each selection can only be dispatched once."
            )
        if self._left:
            raise RuntimeError(
                f"The `async with` block that chose {self.replica_id} has ended: dispatch inside it, or choose again."
            )
        self._dispatched = True
        chosen = self._handle.options(stream=handle._options.stream)
        response: Any = chosen._aimed(self.replica_id).remote(*args, **kwargs)
        if self._reservation is not None and response._call is not None:
            self._reservation.redeem(response._call)
        return response  # type: ignore[no-any-return]


@contextlib.asynccontextmanager
async def choose(
    handle: DeploymentHandle, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncIterator[ReplicaSelection]:
    """See `DeploymentHandle.choose_replica`."""
    from rayserve_fast.replica import facts

    owner = _owner(handle)
    told = await _replicas(handle, owner)
    known = owner.chooser.replicas(handle._key)
    if known is not None and known[1] is not None:
        reservation = await asyncio.wrap_future(owner.routers.submit(_by_router(handle, owner, args, kwargs)))
    else:
        reservation = await _by_policy(handle, owner)
    try:
        known = owner.chooser.replicas(handle._key) or ([], None)
        chosen = next(one for one in (*known[0], *told) if one[0] == reservation.replica)  # it may just have left
        _, node_id, tcp, *_, metadata, _stats = chosen
        host, _, port = (tcp or "").rpartition(":")
        selection = ReplicaSelection(
            reservation.replica,
            host,
            int(port) if port else None,
            node_id,
            replica_metadata=facts.read(metadata),
            _handle=handle,
            _reservation=reservation,
        )
        try:
            yield selection
        finally:
            selection._left = True
    finally:
        reservation.release()


async def _by_policy(handle: DeploymentHandle, owner: Caller) -> Reservation:
    options, pause = handle._options, PAUSES_S[0]
    wishes = options.multiplexed_model_id, options.session_id, options._prefer_local_routing
    while (got := _reserve(handle, owner, *wishes)) is None:
        await asyncio.sleep(pause)
        pause = min(PAUSES_S[1], 2 * pause)
    return got


async def _by_router(
    handle: DeploymentHandle, owner: Caller, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Reservation:
    """On the routers' loop."""
    from functools import partial

    from rayserve_fast.handle import new_request_id
    from rayserve_fast.request_router import PendingRequest, RequestMetadata

    options, got = handle._options, []
    request_id = new_request_id()
    metadata = RequestMetadata(
        request_id,
        request_id,
        options.method_name,
        app_name=handle.app_name,
        multiplexed_model_id=options.multiplexed_model_id,
        session_id=options.session_id,
        prefers_local=options._prefer_local_routing,
    )

    def reserve(ranks: list[list[str]]) -> str | None:
        if (reservation := _reserve(handle, owner, ranks=ranks)) is None:
            return None
        got.append(reservation)
        return reservation.replica

    known = partial(owner.chooser.replicas, handle._key)
    await owner.routers.place(handle._key, known, PendingRequest(list(args), kwargs, metadata), reserve)
    return got[0]


def _reserve(
    handle: DeploymentHandle,
    owner: Caller,
    model_id: str = "",
    session_id: str = "",
    near: bool = False,
    ranks: list[list[str]] | None = None,
) -> Reservation | None:
    """A slot, None while none is free; DeploymentUnavailableError if none ever will be."""
    try:
        got = owner.chooser.reserve(handle._key, model_id, session_id, near, ranks)
    except ValueError as why:
        raise DeploymentUnavailableError._because(handle.deployment_id, str(why)) from None
    if got is None and owner.chooser.replicas(handle._key) is None:
        raise DeploymentUnavailableError._because(handle.deployment_id, f"{handle.deployment_id} was deleted.")
    return got


async def _replicas(handle: DeploymentHandle, owner: Caller) -> list[Told]:
    """The replicas of a deployment, once there are any."""
    until, pause = time.monotonic() + KNOWN_S, PAUSES_S[0]
    while True:
        known = owner.chooser.replicas(handle._key)
        if known is not None and known[0]:
            return known[0]
        if time.monotonic() > until:
            why = "has no replica" if known is not None else "does not exist"
            raise DeploymentUnavailableError._because(handle.deployment_id, f"{handle.deployment_id} {why}.")
        await asyncio.sleep(pause)
        pause = min(PAUSES_S[1], 2 * pause)


async def _answer(response: Any) -> Any:
    return await response


def _owner(handle: DeploymentHandle) -> Caller:
    from rayserve_fast.caller import Caller

    owner = handle._find_caller()
    if not isinstance(owner, Caller):
        raise RayServeException("Replicas cannot be chosen in local testing mode: each deployment has one.")
    if handle._key.startswith("split:"):
        raise RayServeException(
            f"'{handle._key}' is shared by several deployments: choose replicas with the handle of one of them."
        )
    return owner
