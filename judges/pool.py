"""Several chat servers with one model behind them: each call goes to the least busy that answers, and again if need be.

Three things end a wait. A call has a time-out, after which it is tried elsewhere; a question has a deadline, all its
calls and waits together; and where nobody answers at all, `Unavailable` is raised, not one failure after another.
"""

import asyncio
import email.utils
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from judges.base import Unavailable
from judges.replies import BadReply, NoAnswer, served_models

T = TypeVar("T")

Call = Callable[[dict[str, Any], Callable[[bytes], T]], Awaitable[T]]
"""Sends the arguments of a chat completion and reads the reply's body."""

PROBES = 3
"""How often the health of a server is asked for before it counts as down."""


@dataclass(frozen=True)
class Limits:
    """How hard the servers are tried. Times are in seconds.

    With the defaults a server that is entirely down ends a call within 60: its deadline (40), and three probes (3 each)
    with their waits.

    Attributes:
        concurrency: calls in flight, over all servers.
        timeout: for one call.
        deadline: for one question, with all its calls, retries and waits.
        retries: tries of one call after the first.
        backoff: the wait before the second try; it doubles each time, and as much is added at random.
        longest_wait: the most that is waited before a try, unless the server's Retry-After says more.
        failures: as many in a row and a server rests.
        rest: the time between two looks at a server that rests.
        patience: how long to wait while all rest.
        probe: for one look at a server's health.
    """

    concurrency: int = 16
    timeout: float = 20.0
    deadline: float = 40.0
    retries: int = 4
    backoff: float = 0.5
    longest_wait: float = 8.0
    failures: int = 8
    rest: float = 5.0
    patience: float = 20.0
    probe: float = 3.0

    def __post_init__(self):
        for field in fields(self):
            least = 0 if field.name == "retries" else 1 if field.type is int else 1e-3
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name}: {getattr(self, field.name)} is less than {least}")


@dataclass
class Server:
    """One URL and how it is doing: calls in flight, failures in a row, and what went wrong last."""

    url: str
    client: AsyncOpenAI
    in_flight: int = 0
    failures: int = 0
    resting: bool = False
    trouble: str = ""


class CallFailed(Exception):
    """One call failed.

    Attributes:
        answered: whether the server replied at all.
        again: whether another try may succeed.
        busy: whether it only had too much to do.
        wait: the seconds that the server asks to wait.
    """

    def __init__(self, reason: str, *, answered: bool, again: bool, busy: bool = False, wait: float = 0.0):
        super().__init__(reason)
        self.answered, self.again, self.busy, self.wait = answered, again, busy, wait


@dataclass
class _Tried:
    """What one question has been through."""

    reason: str = ""
    last: Server | None = None


class Pool:
    """Servers that are called; made by `opened`."""

    def __init__(self, servers: Sequence[Server], model: str, limits: Limits):
        self.servers, self.model, self.limits = servers, model, limits
        self._silent = 0
        self._awake = asyncio.Event()
        self._nurses: set[asyncio.Task] = set()
        self._jitter = wait_exponential_jitter(
            multiplier=limits.backoff, max=limits.longest_wait, jitter=limits.backoff
        )

    async def check(self) -> None:
        """Every server that can be reached must serve the model; those that cannot rest.

        Raises:
            ValueError: one serves other models, or refuses us.
            Unavailable: none can be reached.
        """
        found = await asyncio.gather(*(self._served(server) for server in self.servers))
        for server, models in zip(self.servers, found, strict=True):
            if isinstance(models, CallFailed):
                if not models.again:
                    raise ValueError(f"urls: {models}; does the URL end in /v1, and is api_key_env right?")
                self._put_to_rest(server)
            elif self.model not in models:
                names = ", ".join(models) or "nothing"
                raise ValueError(f"model: {server.url} does not serve {self.model!r}, it serves {names}")
        if all(server.resting for server in self.servers):
            raise Unavailable(f"no judge can be reached: {self._troubles()}")
        self._awake.set()

    async def talk(self, conversation: Callable[[Call], Awaitable[T]]) -> T:
        """The outcome of a conversation of one or several calls, all within the deadline.

        Raises:
            NoAnswer: it was refused, or given up.
            Unavailable: it was given up, and no server is well.
        """
        tried = _Tried()

        async def call(request: dict[str, Any], read: Callable[[bytes], T]) -> T:
            return await self._call(tried, request, read)

        try:
            async with asyncio.timeout(self.limits.deadline):
                return await conversation(call)
        except TimeoutError:
            reason = f"no answer within {self.limits.deadline:g} s; last: {tried.reason or 'all servers rested'}"
        except CallFailed as failure:
            if not failure.again:
                raise NoAnswer(str(failure)) from None
            reason = f"no answer in {self.limits.retries + 1} tries; last: {failure}"
        await self._given_up()
        raise NoAnswer(reason)

    async def close(self) -> None:
        for nurse in self._nurses:
            nurse.cancel()
        await asyncio.gather(*self._nurses, return_exceptions=True)

    async def _call(self, tried: _Tried, request: dict[str, Any], read: Callable[[bytes], T]) -> T:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.limits.retries + 1),
            wait=self._wait,
            retry=retry_if_exception(_may_succeed),
            reraise=True,
        )
        return await retrying(self._once, tried, request, read)

    async def _once(self, tried: _Tried, request: dict[str, Any], read: Callable[[bytes], T]) -> T:
        server = await self._pick(tried.last)
        tried.last, tried.reason = server, tried.reason or f"{server.url} was still at it"
        server.in_flight += 1
        try:
            async with asyncio.timeout(self.limits.timeout):
                response = await server.client.chat.completions.with_raw_response.create(**request)
            outcome = read(response.http_response.content)
        except NoAnswer:
            self._note_reply(server)
            raise
        except (OpenAIError, TimeoutError, BadReply) as error:
            failure = call_failed(server.url, error, self.limits.timeout)
            tried.reason = server.trouble = str(failure)
            self._note_failure(server, failure)
            raise failure from None
        finally:
            server.in_flight -= 1
        self._note_reply(server)
        return outcome

    async def _pick(self, avoided: Server | None) -> Server:
        """The least busy that is awake, another than `avoided` if there is one."""
        while not (awake := [server for server in self.servers if not server.resting]):
            try:
                async with asyncio.timeout(self.limits.patience):
                    await self._awake.wait()
            except TimeoutError:
                raise Unavailable(f"no judge answered for {self.limits.patience:g} s: {self._troubles()}") from None
        return min(awake, key=lambda server: (server is avoided, server.in_flight))

    def _wait(self, state: RetryCallState) -> float:
        return max(self._jitter(state), state.outcome.exception().wait)

    def _note_reply(self, server: Server) -> None:
        self._silent = server.failures = 0

    def _note_failure(self, server: Server, failure: CallFailed) -> None:
        """Counts a failure; being busy is none, and a refusal is a sign of health."""
        if failure.answered:
            self._silent = 0
        if not failure.again:
            server.failures = 0
        elif not failure.busy:
            server.failures += 1
            if server.failures >= self.limits.failures and not server.resting:
                self._put_to_rest(server)

    def _put_to_rest(self, server: Server) -> None:
        server.resting = True
        if all(other.resting for other in self.servers):
            self._awake.clear()
        nurse = asyncio.create_task(self._revive(server))
        self._nurses.add(nurse)
        nurse.add_done_callback(self._nurses.discard)

    async def _revive(self, server: Server) -> None:
        """Lets a server rest until it is found well."""
        while True:
            await asyncio.sleep(self.limits.rest)
            if await self._is_well(server):
                server.failures, server.resting = 0, False
                self._awake.set()
                return

    async def _given_up(self) -> None:
        """One question failing is its own affair, unless nobody is there or nobody replied to a whole round of them.

        A server may hang and still report that it is well, and waiting for each question's deadline would take hours.
        """
        self._silent += 1
        if self._silent > self.limits.concurrency:
            raise Unavailable(
                f"no judge replied to {self._silent} questions in a row (where it is only slow, raise timeout and "
                f"deadline): {self._troubles()}"
            )
        if not any(await asyncio.gather(*(self._is_well(server) for server in self.servers))):
            raise Unavailable(f"no judge can be reached: {self._troubles()}")

    async def _is_well(self, server: Server) -> bool:
        models = await self._served(server)
        return not isinstance(models, CallFailed) and self.model in models

    async def _served(self, server: Server) -> list[str] | CallFailed:
        """The models that a server reports, or why it does not."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(PROBES), wait=self._jitter, retry=retry_if_exception(_may_succeed), reraise=True
        )
        try:
            return await retrying(self._look, server)
        except CallFailed as failure:
            server.trouble = str(failure)
            return failure

    async def _look(self, server: Server) -> list[str]:
        try:
            async with asyncio.timeout(self.limits.probe):
                response = await server.client.models.with_raw_response.list()
            return served_models(response.http_response.content)
        except (OpenAIError, TimeoutError, BadReply) as error:
            raise call_failed(server.url, error, self.limits.probe) from None

    def _troubles(self) -> str:
        return "; ".join(server.trouble or server.url for server in self.servers)


@asynccontextmanager
async def opened(urls: Sequence[str], model: str, api_key: str, limits: Limits) -> AsyncIterator[Pool]:
    """A pool whose servers were looked at, closed at the end. Raises what `Pool.check` raises."""
    async with AsyncExitStack() as stack:
        servers = []
        for url in urls:
            # A proxy of the environment cannot reach a server of this machine.
            direct = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
            http = DefaultAsyncHttpxClient(trust_env=not direct)
            client = AsyncOpenAI(base_url=url, api_key=api_key, max_retries=0, timeout=None, http_client=http)
            servers.append(Server(url, await stack.enter_async_context(client)))
        pool = Pool(servers, model, limits)
        stack.push_async_callback(pool.close)
        await pool.check()
        yield pool


def call_failed(url: str, error: Exception, timeout: float) -> CallFailed:
    """What an error of one call of at most `timeout` seconds means."""
    match error:
        case TimeoutError():
            return CallFailed(f"{url}: no reply within {timeout:g} s", answered=False, again=True)
        case BadReply():
            return CallFailed(f"{url}: bad reply: {error}", answered=True, again=True)
        case APIConnectionError():
            cause = error.__cause__ or error
            return CallFailed(f"{url}: {type(cause).__name__} {cause}".strip(), answered=False, again=True)
        case APIStatusError():
            again = error.status_code in (408, 429) or error.status_code >= 500
            wait = retry_after(error.response.headers.get("retry-after", ""), time.time())
            return CallFailed(
                f"{url}: {str(error)[:300]}", answered=True, again=again, busy=error.status_code == 429, wait=wait
            )
        case _:
            return CallFailed(f"{url}: {error}", answered=False, again=False)


def retry_after(header: str, now: float) -> float:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3), a number of seconds or a date; 0 where it is neither.

    `now` is in seconds since the epoch.
    """
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return 0.0


def _may_succeed(error: BaseException) -> bool:
    return isinstance(error, CallFailed) and error.again
