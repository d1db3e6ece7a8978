"""Certificates and the gate, without a SuperLink behind it; needs what Flower brings."""

from __future__ import annotations

import http.server
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.flower
httpx = pytest.importorskip("httpx")
pytest.importorskip("flwr")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402
from cryptography.hazmat.primitives.serialization import (  # noqa: E402
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from flwr.supercore.protobuf.client import ProtobufRequestContext  # noqa: E402
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor  # noqa: E402

from fedkdx_plugin.flower import certificates  # noqa: E402
from fedkdx_plugin.flower.processes import free_port  # noqa: E402
from registry.errors import UserError  # noqa: E402


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers every call with what it was sent, and remembers where."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.calls.append(self.path)
        self.send_response(207)
        self.send_header("x-own", self.headers["x-signature"])
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def everything():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def upstream(everything):
    """Return what stands behind the gate; `calls` are this test's."""
    everything.calls = []
    return everything


def make_keys(folder: Path) -> Path:
    certificates.make(folder / "keys", ["localhost", "127.0.0.1"], 2)
    return folder / "keys"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("parties"))


@pytest.fixture
def own_keys(tmp_path):
    """Return keys that a test may change."""
    return make_keys(tmp_path)


# short enough to wait for
LIMITS = {
    "HEAD_SECONDS": 3.0,
    "BODY_SECONDS": 1.5,
    "SLOWEST": 1000,
    "MOST_BYTES": 100_000,
    "MOST_CONNECTIONS": 12,
    "MOST_FROM_ONE": 5,
    "MOST_FILES": 60,
}
LIMITED = (
    "from fedkdx_plugin.flower import gate\n"
    f"for name, value in {LIMITS}.items():\n    assert hasattr(gate, name)\n    setattr(gate, name, value)\n"
    "gate.main()"
)


@pytest.fixture(scope="module")
def address(everything, keys):
    """Return where a gate listens that knows the key of site 0 alone."""
    port, own = free_port(), keys / "server"
    command = [sys.executable, "-c", LIMITED, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--upstream", f"http://127.0.0.1:{everything.server_port}"]
    command += ["--certificate", str(own / certificates.CERTIFICATE), "--key", str(own / certificates.KEY)]
    command += ["--allow", str(own / "keys" / "client-0.pub")]
    process = subprocess.Popen(command)
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    yield "localhost", port
    process.terminate()
    process.wait()


def trust(keys: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=keys / "site-0" / certificates.AUTHORITY)


def signed(keys: Path, site: int) -> dict[str, str]:
    """Return what a site's calls are signed with."""
    key = load_ssh_private_key((keys / f"site-{site}" / certificates.SITE_KEY).read_bytes(), None)
    request = httpx.Request("POST", "http://any")
    context = ProtobufRequestContext("", None, request)
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda context: None)
    return {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}


@pytest.fixture
def client(address, upstream, keys):
    """Return site 0's connection to the gate: it trusts the certificate that it was given, and no other."""
    host, port = address
    with httpx.Client(base_url=f"https://{host}:{port}", verify=trust(keys), headers=signed(keys, 0)) as client:
        yield client


@pytest.fixture
def connect(address, upstream, keys):
    """Return what opens a raw connection to the gate."""
    opened = []

    def connect(source: str = "127.0.0.1") -> ssl.SSLSocket:
        plain = socket.create_connection(address, 10, (source, 0))
        opened.append(trust(keys).wrap_socket(plain, server_hostname="localhost"))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def head(headers: dict[str, str], length: int, method: str = "POST", path: str = "/v1/fleet/push-object") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {length}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")


def hear(connection: ssl.SSLSocket) -> bytes:
    """Return all that the gate sends until it ends the connection."""
    said = b""
    try:
        while part := connection.recv(4096):
            said += part
    except (ConnectionError, ssl.SSLError):  # it did not read what was still to come
        pass
    return said


def test_sites_calls_are_passed_on_as_they_are(client, upstream):
    answer = client.post("/v1/fleet/pull-messages", content=b"\x00\xff" * 1000, headers={"x-signature": "abc"})
    assert (answer.status_code, answer.headers["x-own"], answer.content) == (207, "abc", b"\x00\xff" * 1000)
    assert upstream.calls == ["/v1/fleet/pull-messages"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/pull-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control",
        "/",
    ],
)
def test_nothing_else_reaches_the_superlink(path, client, upstream):
    assert client.post(path).status_code == 403
    assert client.get("/v1/fleet/pull-messages").status_code == 405
    assert upstream.calls == []


@pytest.mark.parametrize("whose", ["nobody", "a stranger", "site 0, for another time"])
def test_without_a_registered_key_nothing_is_read_but_the_head(whose, connect, keys, upstream):
    headers = {} if whose == "nobody" else signed(keys, 1 if whose == "a stranger" else 0)
    if whose.startswith("site 0"):
        headers["flwr-timestamp"] = "2020-01-01T00:00:00+00:00"  # so the signature does not fit
    connection = connect()
    connection.sendall(head(headers, 1_500_000_000))
    assert hear(connection).startswith(b"HTTP/1.1 401 ")
    assert upstream.calls == []


def test_a_call_that_is_too_long_is_refused(client, connect, keys, upstream):
    assert client.post("/v1/fleet/push-object", content=bytes(100_000)).status_code == 207
    connection = connect()
    connection.sendall(head(signed(keys, 0), 1_500_000_000))
    with pytest.raises((ConnectionError, ssl.SSLError)):
        for _ in range(10_000):
            connection.sendall(bytes(10_000))
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x",
        head({}, 10, "GET"),  # answered with 405, and what it announced never comes
        head({}, 10, "GET") + b"0123456789POST /v1",  # the next one's head
    ],
)
def test_a_head_that_does_not_come_ends_the_connection(sent, connect):
    connection = connect()
    connection.sendall(sent)
    began = time.monotonic()
    hear(connection)
    assert time.monotonic() - began < 8


def test_a_head_that_comes_by_drops_does_not_live_longer(connect):
    connection, began = connect(), time.monotonic()
    with pytest.raises((ConnectionError, ssl.SSLError)):
        for byte in head({}, 10) * 100:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)
    assert time.monotonic() - began < 8


def test_a_body_that_is_too_slow_is_refused(connect, keys, upstream):
    connection = connect()
    connection.sendall(head(signed(keys, 0), 2000))
    began = time.monotonic()
    for _ in range(10):
        connection.sendall(b"x")
        time.sleep(0.1)
    assert b"HTTP/1.1 408 " in hear(connection)
    assert 1 < time.monotonic() - began < 5
    assert upstream.calls == []


def test_connections_from_one_address_are_limited(connect, keys):
    """Those that are there stay, and there is room again once one has ended."""
    call = head({**signed(keys, 0), "connection": "close"}, 0)
    there = [connect() for _ in range(LIMITS["MOST_FROM_ONE"])]
    assert hear(connect()) == b""
    there[0].sendall(call)
    assert hear(there[0]).startswith(b"HTTP/1.1 207 ")
    there[0].close()
    time.sleep(0.3)
    another = connect()
    another.sendall(call)
    assert hear(another).startswith(b"HTTP/1.1 207 ")


def test_connections_from_all_addresses_together_are_limited(connect, keys):
    there = [connect(f"127.0.0.{2 + place // 4}") for place in range(LIMITS["MOST_CONNECTIONS"])]
    assert hear(connect("127.0.0.9")) == b""
    there[0].sendall(head({**signed(keys, 0), "connection": "close"}, 0))
    assert hear(there[0]).startswith(b"HTTP/1.1 207 ")


def test_connections_that_never_shake_hands_do_not_keep_sites_out_for_long(address, connect, keys):
    """They take all files that the gate may open; those who wait come in when these have been ended."""
    idle = [socket.create_connection(address, 10) for _ in range(LIMITS["MOST_FILES"] + 10)]
    began = time.monotonic()
    call = head({**signed(keys, 0), "connection": "close"}, 0)
    site = connect()
    site.sendall(call)
    assert hear(site).startswith(b"HTTP/1.1 207 ")
    assert time.monotonic() - began < 30  # without a limit of its own, a minute
    assert idle[0].recv(1) == b""
    for connection in idle:
        connection.close()


def test_a_header_of_any_bytes_is_passed_on(connect, keys, upstream):
    connection = connect()
    connection.sendall(head({**signed(keys, 0), "x-note": "\xe9", "connection": "close"}, 0))
    assert hear(connection).startswith(b"HTTP/1.1 207 ")
    assert upstream.calls == ["/v1/fleet/push-object"]
    connection = connect()
    connection.sendall(head({**signed(keys, 0), "flwr-signature": "\xe9", "connection": "close"}, 0))
    assert hear(connection).startswith(b"HTTP/1.1 401 ")


def test_a_site_that_does_not_trust_the_certificate_stays_away(client, keys, tmp_path):
    certificates.make(tmp_path / "others", ["localhost"], 1)
    other = ssl.create_default_context(cafile=tmp_path / "others" / "site-0" / certificates.AUTHORITY)
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.post(f"{client.base_url}/v1/fleet/get-run", verify=other)


def test_each_site_has_a_key_of_its_own_that_nobody_else_can_read(keys):
    public = []
    for site in range(2):
        path = keys / f"site-{site}" / certificates.SITE_KEY
        registered = load_ssh_public_key((keys / "server" / "keys" / f"client-{site}.pub").read_bytes())
        public.append(registered.public_numbers())
        assert load_ssh_private_key(path.read_bytes(), None).public_key().public_numbers() == public[-1]
    assert public[0] != public[1]
    assert not list((keys / "server").rglob("site.key"))
    for path in [keys, *keys.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
    with pytest.raises(UserError, match="is there already"):
        certificates.make(keys, ["localhost"], 2)


def test_a_missing_file_is_named(own_keys):
    server, site = own_keys / "server", own_keys / "site-1"
    assert [path.name for path in certificates.public_keys(server)] == ["client-0.pub", "client-1.pub"]
    assert certificates.site_files(site) == (site / "ca.pem", site / "site.key")
    ed25519 = Ed25519PrivateKey.generate()
    (site / "site.key").write_bytes(ed25519.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    with pytest.raises(UserError, match=r"site\.key: not a key of an elliptic curve; make it with: ssh-keygen"):
        certificates.site_files(site)
    (site / "site.key").unlink()
    with pytest.raises(UserError, match=r"site\.key: missing; whoever runs the server"):
        certificates.site_files(site)
    registered = certificates.public_keys(server)
    registered[0].write_text("ssh-rsa x")
    with pytest.raises(UserError, match=r"client-0\.pub: not a key that can be read"):
        certificates.public_keys(server)
    for path in registered:
        path.unlink()
    with pytest.raises(UserError, match="holds no public key"):
        certificates.public_keys(server)
    (server / "server.key").unlink()
    with pytest.raises(UserError, match=r"server\.key: missing; `fedkdx certificates` makes it"):
        certificates.public_keys(server)
