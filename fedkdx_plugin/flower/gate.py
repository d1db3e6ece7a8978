"""A gate before a SuperLink: it passes on the calls that a SuperNode makes, and nothing else.

Flower 1.41 serves three interfaces on one port. The sites' own (`/v1/fleet`) asks for a registered key. The other two
ask for nothing without Flower's paid extensions (`superlink/auth_plugin/noop_auth_plugin.py`): through `/v1/control`
whoever reaches the port can start a run, that is, run any code at every site; through `/v1/runtime`, take over a run.
So the SuperLink listens on this machine alone, and this gate passes on the sites' calls.
"""

from __future__ import annotations

import argparse
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

ALLOWED = re.compile(r"/v1/fleet/[a-z-]+")
SECONDS = 60.0  # for the SuperLink to answer
OWN_HEADERS = {"host", "connection", "content-length", "transfer-encoding"}  # of each of the two connections


def make(upstream: str, verify: ssl.SSLContext | bool) -> Starlette:
    """Return the gate as an ASGI application.

    Args:
        upstream: URL of the SuperLink.
        verify: what the SuperLink's certificate is checked against.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        async with httpx.AsyncClient(base_url=upstream, verify=verify, timeout=SECONDS, trust_env=False) as client:
            yield {"client": client}

    return Starlette(routes=[Route("/{path:path}", _pass_on, methods=["POST"])], lifespan=lifespan)


async def _pass_on(request: Request) -> Response:
    """Pass on a call of a site; answer any other with 403."""
    path = request.scope["path"]
    if not ALLOWED.fullmatch(path):
        return PlainTextResponse("not for sites\n", status_code=403)
    headers = [(name, value) for name, value in request.headers.items() if name not in OWN_HEADERS]
    try:
        answer = await request.state.client.post(path, content=await request.body(), headers=headers)
    except httpx.TransportError as error:
        return PlainTextResponse(f"the SuperLink does not answer: {type(error).__name__}\n", status_code=502)
    kept = {name: value for name, value in answer.headers.items() if name not in OWN_HEADERS | {"content-encoding"}}
    return Response(answer.content, answer.status_code, kept)


def main() -> None:
    """Run a gate until the process is told to end."""
    parser = argparse.ArgumentParser(prog="fedkdx gate")
    for name in ("--host", "--port", "--upstream"):
        parser.add_argument(name, required=True)
    for name in ("--authority", "--certificate", "--key"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    verify = ssl.create_default_context(cafile=given.authority) if given.authority else True
    uvicorn.run(
        make(given.upstream, verify),
        host=given.host,
        port=int(given.port),
        ssl_certfile=given.certificate,
        ssl_keyfile=given.key,
        access_log=False,
    )


if __name__ == "__main__":
    main()
