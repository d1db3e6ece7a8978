"""Certificates and the gate, without a SuperLink behind it; needs what Flower brings."""

from __future__ import annotations

import http.server
import ssl
import subprocess
import sys
import threading
import time

import pytest

pytestmark = pytest.mark.flower
httpx = pytest.importorskip("httpx")
pytest.importorskip("flwr")

from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key  # noqa: E402

from fedkdx_plugin.flower import certificates, gate  # noqa: E402
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


@pytest.fixture
def upstream():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.calls = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def keys(tmp_path):
    certificates.make(tmp_path / "keys", ["localhost", "127.0.0.1"], 2)
    return tmp_path / "keys"


@pytest.fixture
def client(upstream, keys):
    """Return a site's connection to the gate: it trusts the certificate that it was given, and no other."""
    port, own = free_port(), keys / "server"
    command = [sys.executable, "-m", gate.__name__, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--upstream", f"http://127.0.0.1:{upstream.server_port}"]
    command += ["--certificate", str(own / certificates.CERTIFICATE), "--key", str(own / certificates.KEY)]
    process = subprocess.Popen(command)
    trusted = ssl.create_default_context(cafile=keys / "site-0" / certificates.AUTHORITY)
    with httpx.Client(base_url=f"https://localhost:{port}", verify=trusted) as client:
        for _ in range(300):
            try:
                client.post("/")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield client
    process.terminate()
    process.wait()


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


def test_a_site_that_does_not_trust_the_certificate_stays_away(client, keys, tmp_path):
    certificates.make(tmp_path / "others", ["localhost"], 1)
    other = ssl.create_default_context(cafile=tmp_path / "others" / "site-0" / certificates.AUTHORITY)
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.post(f"{client.base_url}/v1/fleet/get-run", verify=other)


def test_each_site_has_a_key_of_its_own_that_nobody_else_can_read(keys):
    public = []
    for site in range(2):
        path = keys / f"site-{site}" / certificates.SITE_KEY
        assert path.stat().st_mode & 0o77 == 0
        registered = load_ssh_public_key((keys / "server" / "keys" / f"client-{site}.pub").read_bytes())
        public.append(registered.public_numbers())
        assert load_ssh_private_key(path.read_bytes(), None).public_key().public_numbers() == public[-1]
    assert public[0] != public[1]
    assert not list((keys / "server").rglob("site.key"))
    with pytest.raises(UserError, match="is there already"):
        certificates.make(keys, ["localhost"], 2)


def test_a_missing_file_is_named(keys):
    server, site = keys / "server", keys / "site-1"
    assert [path.name for path in certificates.public_keys(server)] == ["client-0.pub", "client-1.pub"]
    assert certificates.site_files(site) == (site / "ca.pem", site / "site.key")
    (site / "site.key").unlink()
    with pytest.raises(UserError, match=r"site\.key: missing; whoever runs the server"):
        certificates.site_files(site)
    for path in certificates.public_keys(server):
        path.unlink()
    with pytest.raises(UserError, match="holds no public key"):
        certificates.public_keys(server)
    (server / "server.key").unlink()
    with pytest.raises(UserError, match=r"server\.key: missing; `fedkdx certificates` makes it"):
        certificates.public_keys(server)
