"""The native extension, as Python sees it; `rust/pyext` says what is behind each name. Held against it by stubtest."""

from __future__ import annotations

from asyncio import AbstractEventLoop, Task
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from contextvars import Context
from typing import Any, Protocol, TypeAlias, final

__all__ = [
    "Batcher",
    "Call",
    "CallHead",
    "Callee",
    "Chooser",
    "Client",
    "Mailbox",
    "Proxy",
    "RequestHead",
    "Reservation",
    "Ticket",
    "Worker",
    "__version__",
    "check_pattern",
    "check_snapshot",
    "head_parts",
]

__version__: str

#: A replica as `routing.Told` describes it.
_Told: TypeAlias = tuple[str, str, str | None, bool, bool, int, int, list[str], str | None, str | None]

def check_pattern(pattern: str) -> None:
    """Raises ValueError if a route's pattern has no meaning: an unknown convertor, or a parameter twice."""

def check_snapshot(snapshot: bytes) -> None:
    """Raises ValueError if proxies and handles could not read this snapshot, by their own parser; says why."""

_Buffer: TypeAlias = bytes | bytearray | memoryview

@final
class Proxy:
    """One node's HTTP proxy; see `rayserve_fast.controlplane.proxy`. Blocking methods detach."""

    def __new__(cls, config: bytes) -> Proxy: ...
    def start(self) -> tuple[str, int]: ...
    def publish(self, snapshot: bytes) -> bool: ...
    def wait_linked(self, replica_ids: list[str], timeout_s: float) -> list[str]: ...
    def counters(self) -> dict[str, int]: ...
    def traffic(self) -> str:
        """JSON of what splits have counted since the start, by split: `targets` and `shadows` by name.

        A target has `requests`, `errors` and `latency`, the filled buckets of a histogram as pairs of upper bound in
        microseconds and count, the bounds ascending. A shadow has `copied`, `answered` and `errors`, and `dropped` by
        reason.
        """

    def metrics_text(self) -> str:
        """The text of `/-/metrics`."""

    def batches(self) -> str:
        """What is counted of batches, as JSON by `app#deployment`.

        Each has `batches`, `requests`, `released` (`full`, `waited`), and pairs of upper bound and count: `size` in
        requests and `wait_us` for the time that the first request of a batch has waited.
        """

    def drain(self) -> None: ...
    def shutdown(self, timeout_s: float) -> None: ...
    def choices_fileno(self) -> int:
        """Readable when requests wait for a router in Python, or have ended that had one."""

    def choices(self) -> tuple[list[tuple[int, str, str, str, str, str]], list[int]]:
        """New ones: number, deployment, route, request, model and session id; and the numbers of those that have ended.

        The end of every assigned request is told; that of one whose `assign` says that it has ended may be.
        """

    def assign(self, number: int, ranks: list[list[str]]) -> str | None:
        """The replica that has got the request; None: none of these has room; empty: the request has ended."""

    def candidates(self, number: int) -> tuple[list[_Told], str | None] | None: ...

@final
class Batcher:
    """What waits for a function of `serve.batch` on one event loop; see `batch_queue`. On its thread, except `resize`.

    `run` is called with the tickets of a batch, their only arguments (None if some have more), the contexts of their
    requests, whether these are for different models, the batch's size, and the seconds that the oldest has waited.
    """

    def __new__(
        cls,
        event_loop: AbstractEventLoop,
        check: Callable[[tuple[Any, ...], dict[str, Any]], int],
        run: Callable[[list[Ticket], list[Any] | None, list[Any], bool, float, float], None],
        weigh: Callable[[list[Any]], float] | None,
        max_size: int,
        wait_s: float,
        concurrent: int,
        name: str,
    ) -> Batcher: ...
    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], context: object) -> Ticket:
        """Queue a call, unless `check` raises; it tells how many arguments are the object of a method, none or one."""

    def turn(self) -> None: ...
    def due(self) -> None: ...
    def wake(self) -> None: ...
    def release(self) -> None: ...
    def resize(self, max_size: int, wait_s: float) -> None: ...
    def load(self) -> tuple[int, int]:
        """Items that wait, batches that run."""

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Task[Any]: ...
    def finish(self, tickets: list[Ticket], results: list[Any]) -> None: ...
    def fail(self, tickets: list[Ticket], error: BaseException) -> None: ...
    def give(self, tickets: list[Ticket], items: list[Any], ended: object) -> None:
        """An item for each, or its end where `ended` stands."""

@final
class Ticket(Awaitable[None]):
    """One call of a batched function; a future as tasks know them, which may be awaited again for the next item."""

    @property
    def owner(self) -> object | None: ...
    @property
    def context(self) -> Any: ...
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any] | None]: ...
    def take(self) -> Any: ...
    def abandon(self) -> None: ...
    def __await__(self) -> Generator[Any]: ...
    def __iter__(self) -> Generator[Any]: ...
    def __next__(self) -> Any: ...
    _asyncio_future_blocking: bool
    def get_loop(self) -> AbstractEventLoop: ...
    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context | None = None) -> None: ...
    def remove_done_callback(self, callback: Callable[[Any], object]) -> int: ...
    def cancel(self, msg: object = None) -> bool: ...
    def cancelled(self) -> bool: ...
    def done(self) -> bool: ...
    def result(self) -> None: ...

@final
class Client:
    """All handle calls of one process; see `rayserve_fast.caller`."""

    def __new__(cls, node_id: str, token: bytes) -> Client: ...
    def callee(
        self,
        deployment: str,
        method: str,
        multiplexed_model_id: str,
        session_id: str,
        near: bool,
        stream: bool,
        target: str | None,
    ) -> Callee:
        """What handles of this deployment with these options call.

        `near`: rather a replica of this node; `target`: the one replica that answers.
        """

    def publish(self, snapshot: bytes, fresh: bool) -> None: ...
    def unpublished(self, why: str) -> None: ...
    def announce(self) -> None: ...
    def version(self) -> tuple[int, int] | None: ...
    def tend(self) -> int: ...
    def fileno(self) -> int: ...
    def pump(self, mailbox: Mailbox) -> None: ...
    def batches(self) -> str:
        """As of `Proxy`, for the calls of this process."""

    def unsent(self) -> tuple[int, int]:
        """How many calls have not left this process: those that have a replica, and those that wait for one."""

    def close(self) -> None: ...
    def abandon(self) -> None: ...
    def counters(self) -> dict[str, int]: ...

@final
class Callee:
    """What a handle calls, and how."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], context: object) -> Call | None:
        """A call with plain values; None: the arguments are of other kinds, and have to be packed."""

    def begin(
        self,
        pickle: bytes,
        buffers: Sequence[memoryview],
        context: object,
        needs: Sequence[tuple[int, Call]],
        keep: object,
    ) -> Call | None:
        """A call with packed arguments; None: the value of one of `needs` has been taken, and must be packed too."""

@final
class Call:
    """One call, begun."""

    @property
    def request_id(self) -> str: ...
    def waiting(self) -> _Waiting | None:
        """What a task of the replica's own loop waits on; None: this is another thread or loop."""

    def ready(self) -> bool: ...
    def assigned(self) -> bool: ...
    def items(self) -> list[Any]: ...
    def wait(self, timeout_s: float | None, main: bool) -> bool: ...
    def cancel(self) -> bool: ...
    def outcome(self) -> Any: ...
    def sealed_outcome(self) -> Any:
        """The same, with a value as `("value", pickle, buffers)`."""

@final
class Chooser:
    """What routers in Python, broadcasts and `choose_replica` see of the replicas, and how they take a slot."""

    def __new__(cls, client: Client) -> Chooser: ...
    def choosing(self) -> list[tuple[Call, str, tuple[str, ...], tuple[bool, bool], tuple[Any, ...]]]:
        """Calls that wait for their router since the last time; flags: whether it streams, and prefers this node."""

    def replicas(self, deployment: str) -> tuple[list[_Told], str | None] | None:
        """The replicas and the user's router; None until a snapshot holds the deployment."""

    def assign(self, call: Call, ranks: list[list[str]]) -> str | None:
        """The replica that has got the call; None: none of these has room; empty: the call has ended."""

    def reserve(
        self, deployment: str, model: str, session: str, near: bool, ranks: list[list[str]] | None
    ) -> Reservation | None:
        """A slot; None: there is no room."""

@final
class Reservation:
    """A slot that nobody uses yet."""

    @property
    def replica(self) -> str: ...
    def redeem(self, call: Call) -> None:
        """Sends a call that is for this replica."""

    def release(self) -> None: ...

@final
class Mailbox:
    """Where the tasks of an asyncio loop wait for their calls."""

    def __new__(cls, event_loop: AbstractEventLoop) -> Mailbox: ...
    def fileno(self) -> int: ...
    def wait(self, call: Call) -> Awaitable[None]:
        """Ends with the call, or with its next item."""

    def wait_for_end(self, call: Call) -> Awaitable[None]:
        """Ends with the call, for somebody who takes nothing from it."""

    def is_empty(self) -> bool: ...

class _Waiting(Protocol):
    def __await__(self) -> Generator[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...

class _Hooks(Protocol):
    """What a worker calls in Python; `replica.runtime.Hooks`."""

    @property
    def context(self) -> Any: ...
    @property
    def encode(self) -> Callable[[Any], Any]: ...
    @property
    def failed(self) -> Callable[[RequestHead, BaseException], tuple[int, list[tuple[bytes, bytes]], bytes]]: ...
    @property
    def spawn(self) -> Callable[[], None]: ...
    @property
    def find_method(self) -> Callable[[str, bool], tuple[Callable[..., Any], bool]]: ...
    @property
    def begin_call(self) -> Callable[[CallHead], Any]: ...
    @property
    def run_call(self) -> Callable[[CallHead], Any]: ...
    @property
    def dump_result(self) -> Callable[[Any], tuple[bytes, list[memoryview]]]: ...
    @property
    def dump_error(self) -> Callable[[CallHead, BaseException], tuple[int, bytes]]: ...
    @property
    def idle(self) -> Callable[[], None]: ...
    @property
    def enter_batch(self) -> Callable[[int, str], None]: ...
    @property
    def group(self) -> Callable[[list[CallHead]], Any]: ...
    @property
    def run_group(self) -> Callable[[Any], Any]: ...
    @property
    def results(self) -> Callable[[Any, int], list[Any]]: ...
    @property
    def failed_batch(
        self,
    ) -> Callable[[list[RequestHead], BaseException], tuple[int, list[tuple[bytes, bytes]], bytes]]: ...

class _RequestContext:
    """The attributes that both heads have as the context of what they run; see `context._RequestContext`."""

    @property
    def route(self) -> str: ...
    @property
    def request_id(self) -> str: ...
    @property
    def _internal_request_id(self) -> str: ...
    @property
    def app_name(self) -> str: ...
    @property
    def multiplexed_model_id(self) -> str: ...
    @property
    def session_id(self) -> str: ...
    @property
    def grpc_context(self) -> None: ...
    @property
    def is_http_request(self) -> bool: ...
    @property
    def cancel_on_parent_request_cancel(self) -> bool: ...
    @property
    def _client(self) -> str: ...
    @property
    def _ray_trace_ctx(self) -> None: ...

@final
class RequestHead(_RequestContext):
    """One HTTP request, read from the wire's bytes when asked for; satisfies `replica.request.Head`."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def raw_path(self) -> bytes: ...
    @property
    def query_string(self) -> bytes: ...
    @property
    def root_path(self) -> str: ...
    @property
    def path_params(self) -> dict[str, Any]:
        """What the route's pattern found in the path: str, int, float or UUID; a new dict at each access."""

    @property
    def http_version(self) -> str: ...
    @property
    def scheme(self) -> str: ...
    @property
    def client(self) -> tuple[str, int] | None: ...
    @property
    def server(self) -> tuple[str, int | None] | None: ...
    @property
    def headers(self) -> list[tuple[bytes, bytes]]: ...
    @property
    def encoded(self) -> bytes:
        """The head as it travels; `head_parts` reads it."""

    def header(self, name: bytes) -> bytes | None:
        """The first header of that lower-case name."""

    @property
    def body(self) -> bytes | None:
        """The whole body; None while it is still arriving or once `receive` has given some of it."""

    @property
    def disconnected(self) -> bool: ...
    def scope(self) -> dict[str, Any]:
        """The ASGI connection scope."""

    def read(self) -> Awaitable[bytes | None]: ...
    def receive(self) -> Awaitable[dict[str, Any]]:
        """ASGI receive; after the body it waits for the disconnect."""

    def send(self, message: dict[str, Any]) -> Awaitable[None]:
        """ASGI send; suspends while the client reads more slowly than the application sends."""

def head_parts(
    encoded: bytes,
) -> tuple[
    str,
    str,
    bytes,
    bytes,
    str,
    list[tuple[bytes, bytes]],
    tuple[str, int] | None,
    tuple[str, int | None] | None,
    str,
    str,
    dict[str, Any],
]:
    """What `RequestHead.encoded` holds, in the order of `replica.portable.PARTS`. ValueError: it is no head."""

@final
class CallHead(_RequestContext):
    """One handle call."""

    @property
    def method(self) -> str: ...
    @property
    def streaming(self) -> bool: ...
    def put_item(self, pickle: bytes, buffers: list[memoryview]) -> Awaitable[None] | None:
        """Sends an item; what comes back is to be awaited before the next, a pool thread has waited already."""

    def arguments(self) -> tuple[_Buffer, list[_Buffer], list[tuple[int, _Buffer, list[_Buffer]]]]:
        """The pickle of the pair of arguments, its out-of-band buffers, and the answers of other calls among them.

        Those come with their place, pickle and buffers; None stands for them in the pair. The buffers are writable and
        the receiver's own; they can be had once.
        """

@final
class Worker:
    """The replica's end of its links; see `replica.runtime` for the order of calls."""

    def __new__(
        cls,
        event_loop: AbstractEventLoop,
        hooks: _Hooks,
        *,
        app: str,
        name: str,
        replica_id: str,
        token: bytes,
        max_ongoing_requests: int,
        batched: bool,
        session_header: str,
        kind: str,
        handler: Callable[..., Any],
        request: Callable[[RequestHead], Any] | None,
    ) -> Worker: ...
    def listen_unix(self, path: str) -> None: ...
    def listen_tcp(self, host: str) -> int:
        """Listens on a free port of `host`, an address, and returns it."""

    def fileno(self) -> int:
        """The descriptor that is readable when `tick` has something to do."""

    def attach(self) -> None:
        """Makes the calling thread the one of the event loop."""

    def adopt(self, client: Client, mailbox: Mailbox) -> None: ...
    def tick(self) -> None: ...
    def flush(self) -> None: ...
    def look(self) -> None: ...
    def expire(self) -> None: ...
    def reclaim(self) -> None: ...
    def take(self) -> tuple[Callable[[Any], Any], Any, Any] | None:
        """Waits for a sync job: callable, argument, and what to give back; None when the pool stops."""

    def done(self, head: Any, result: Any, context: Context) -> None:
        """`head` is a `RequestHead`, a `CallHead`, or the group of those that one call has served."""

    def fail(self, head: Any, error: BaseException) -> None: ...
    def stop_pool(self) -> None: ...
    def resize(self, max_ongoing_requests: int) -> None: ...
    def drain(self) -> None:
        """Takes no more requests; `hooks.idle` is called when nothing is left."""

    def announce(self, models: list[str]) -> None:
        """Tells callers which models the user's code holds or loads; on the loop's thread."""

    def load(self) -> int:
        """Requests that run or are held."""

    def counters(self) -> dict[str, int]: ...
    def close(self) -> None:
        """Sends what is unsent and closes every socket; on the loop's thread."""

    def abandon(self) -> None:
        """Closes the descriptors, as a forked child must."""
