"""A gate before a SuperLink: it passes on the calls that registered sites make, and nothing else.

Flower 1.41 serves three interfaces on one port. The sites' own (`/v1/fleet`) asks for a registered key. The other two
ask for nothing without Flower's paid extensions (`superlink/auth_plugin/noop_auth_plugin.py`): through `/v1/control`
whoever reaches the port can start a run; through `/v1/runtime`, take over a run. So the SuperLink listens on this
machine alone, and this gate passes on the sites' calls.

Flower checks a key only after it has read the whole call (`superlink/routers/fleet/node_auth.py`). The gate checks it
on the head, so that whoever has no key can make the server keep no more than a head, for no longer than HEAD_SECONDS.
"""

from __future__ import annotations

import argparse
import asyncio
import asyncio.constants
import re
import resource
import ssl
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes, verify_signature
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedkdx_plugin.flower import certificates

ALLOWED = re.compile(r"/v1/fleet/[a-z-]+")
SECONDS = 60.0  # for the SuperLink to answer
OWN_HEADERS = {b"host", b"connection", b"content-length", b"transfer-encoding"}  # of each of the two connections
MOST_BYTES = 16 * 2**20  # of a call; Flower cuts what is longer than 5 MiB into pieces
HEAD_SECONDS = 10.0  # for the head of a call, and for shaking hands before it
BODY_SECONDS, SLOWEST = 30.0, 10_000  # for the rest, and a second more for so many bytes
MOST_CONNECTIONS, MOST_FROM_ONE = 1000, 250  # at a time, in all and from one address
MOST_FILES = 2 * MOST_CONNECTIONS  # of this process: connections that are still shaking hands count here alone


class Guarded(H11Protocol):
    """Speaks HTTP, with limits on the number of connections and on the time that a call's head takes."""

    addresses: Counter[str] = Counter()  # of all open connections

    def connection_made(self, transport: Any) -> None:
        """Close the connection at once where there are too many."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.addresses[self.address] += 1
        if len(self.connections) > MOST_CONNECTIONS or self.addresses[self.address] > MOST_FROM_ONE:
            transport.abort()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no more."""
        self._late.cancel()
        self.addresses[self.address] -= 1
        if not self.addresses[self.address]:
            del self.addresses[self.address]
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Expect the next call's head."""
        self._late.cancel()
        super().on_response_complete()
        self._expect_head()

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self._end_where_late)

    def _end_where_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # no call is being answered
            self.transport.abort()


class _Refused(Exception):
    """A call is refused: the status, and the reason."""


def make(upstream: str, verify: ssl.SSLContext | bool, keys: Iterable[Path] = ()) -> Starlette:
    """Return the gate as an ASGI application.

    Args:
        upstream: URL of the SuperLink.
        verify: what the SuperLink's certificate is checked against.
        keys: files of the public keys whose holders may come in; none: anybody may.
    """
    known = frozenset(public_key_to_bytes(certificates.read_public_key(path)) for path in keys)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, object]]:
        async with httpx.AsyncClient(base_url=upstream, verify=verify, timeout=SECONDS, trust_env=False) as client:
            yield {"client": client, "keys": known}

    return Starlette(routes=[Route("/{path:path}", _pass_on, methods=["POST"])], lifespan=lifespan)


async def _pass_on(request: Request) -> Response:
    """Pass on a call of a site; answer any other with the reason why not, and close its connection."""
    path, known = request.scope["path"], request.state.keys
    try:
        if not ALLOWED.fullmatch(path):
            raise _Refused(403, "not for sites")
        if known and not _signed(request.headers, known):
            raise _Refused(401, "not signed with a key that is registered here")
        body = await _body(request)
    except _Refused as refused:
        status, reason = refused.args
        return PlainTextResponse(f"{reason}\n", status, {"connection": "close"})
    headers = [(name, value) for name, value in request.headers.raw if name not in OWN_HEADERS]
    try:
        answer = await request.state.client.post(path, content=body, headers=headers)
    except httpx.TransportError as error:
        return PlainTextResponse(f"the SuperLink does not answer: {type(error).__name__}\n", status_code=502)
    own = OWN_HEADERS | {b"content-encoding"}
    response = Response(answer.content, answer.status_code)
    response.raw_headers += [pair for pair in answer.headers.raw if pair[0].lower() not in own]
    return response


def _signed(headers: Mapping[str, str], known: frozenset[bytes]) -> bool:
    """Return whether a call's head is signed with a known key; whether it is recent the SuperLink checks."""
    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        stamp = headers[TIMESTAMP_HEADER].encode("ascii")
    except (KeyError, ValueError):
        return False
    return key in known and bool(verify_signature(bytes_to_public_key(key), stamp, signature))


async def _body(request: Request) -> bytes:
    """Return the rest of a call. Raises _Refused where it is too long or too slow."""
    whole, began, loop = bytearray(), asyncio.get_running_loop().time(), asyncio.get_running_loop()
    rest = request.stream()
    while True:
        left = began + BODY_SECONDS + len(whole) / SLOWEST - loop.time()
        try:
            whole += await asyncio.wait_for(anext(rest), left)
        except StopAsyncIteration:
            return bytes(whole)
        except asyncio.TimeoutError as error:
            raise _Refused(408, f"slower than {SLOWEST} bytes a second") from error
        if len(whole) > MOST_BYTES:
            raise _Refused(413, f"longer than {MOST_BYTES} bytes")


def main() -> None:
    """Run a gate until the process is told to end."""
    parser = argparse.ArgumentParser(prog="fedkdx gate")
    for name in ("--host", "--port", "--upstream"):
        parser.add_argument(name, required=True)
    for name in ("--authority", "--certificate", "--key"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--allow", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    verify = ssl.create_default_context(cafile=given.authority) if given.authority else True
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES if most < 0 else min(MOST_FILES, most), most))
    asyncio.constants.SSL_HANDSHAKE_TIMEOUT = HEAD_SECONDS  # uvicorn leaves it at a minute
    uvicorn.run(
        make(given.upstream, verify, given.allow),
        host=given.host,
        port=int(given.port),
        http=Guarded,
        ws="none",
        loop="asyncio",  # it goes on where no file is left
        ssl_certfile=given.certificate,
        ssl_keyfile=given.key,
        access_log=False,
    )


if __name__ == "__main__":
    main()
