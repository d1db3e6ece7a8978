"""Certificates and keys: make them for a test, and find those that a party was given."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dataset_utils.files import private_files, unwritable
from registry.errors import UserError

AUTHORITY, CERTIFICATE, KEY = "ca.pem", "server.pem", "server.key"
KEYS, SITE_KEY = "keys", "site.key"
DAYS = 90
MADE = "make it with: ssh-keygen -t ecdsa -b 384 -N '' -f site.key"


def site_name(client: int) -> str:
    """Return the name under which a site's key is registered; its holder can be this client and no other."""
    return f"client-{client}"


@private_files()
def make(folder: Path, hosts: Sequence[str], sites: int) -> None:
    """Make a folder for each party: `server` (certificate, key, the sites' public keys) and `site-<k>`.

    Args:
        folder: a new folder.
        hosts: names and addresses by which sites reach the server.
        sites: number of sites.

    Raises:
        UserError: the folder exists, or cannot be made.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{folder}: is there already; name a new folder, or remove it") from error
    except OSError as error:
        raise unwritable(folder, error) from error
    authority = make_server(folder / "server", hosts)
    for client in range(sites):
        own = folder / f"site-{client}"
        own.mkdir()
        (own / AUTHORITY).write_bytes(authority)
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private(own / SITE_KEY, key, serialization.PrivateFormat.OpenSSH)
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        registered = folder / "server" / KEYS / f"{site_name(client)}.pub"
        registered.parent.mkdir(exist_ok=True)
        registered.write_bytes(public + b"\n")


@private_files()
def make_server(folder: Path, hosts: Sequence[str]) -> bytes:
    """Make a server's certificate, signed by an authority whose key is thrown away; return the authority's."""
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedkdx test authority")])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedkdx server")])
    root = (
        _builder(authority, authority, authority_key.public_key(), authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    leaf = (
        _builder(server, authority, key.public_key(), authority_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    text: bytes = root.public_bytes(serialization.Encoding.PEM)
    (folder / AUTHORITY).write_bytes(text)
    (folder / CERTIFICATE).write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    _write_private(folder / KEY, key, serialization.PrivateFormat.PKCS8)
    return text


def public_keys(folder: Path) -> list[Path]:
    """Return the files of the sites' public keys in a server's folder. Raises UserError: one is missing, or no key."""
    for name in (CERTIFICATE, KEY, KEYS):
        if not (folder / name).exists():
            raise UserError(
                f"{folder / name}: missing; `fedkdx certificates` makes it for a test, and --insecure does without"
            )
    keys = sorted((folder / KEYS).glob("*.pub"))
    if not keys:
        raise UserError(f"{folder / KEYS}: holds no public key; put client-0.pub, client-1.pub, ... there")
    for path in keys:
        read_public_key(path)
    return keys


def site_files(folder: Path) -> tuple[Path, Path]:
    """Return the authority's certificate and the private key in a site's folder. Raises UserError: one is no such."""
    authority, key = folder / AUTHORITY, folder / SITE_KEY
    for path in (authority, key):
        if not path.is_file():
            raise UserError(f"{path}: missing; whoever runs the server gives it to this site")
    read_key(key)
    return authority, key


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return a site's private key. Raises UserError unless it is of an elliptic curve, without a passphrase."""
    key = _load(path, lambda data: serialization.load_ssh_private_key(data, None))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path}: not a key of an elliptic curve; {MADE}")
    return key


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Return a site's public key. Raises UserError unless it is of an elliptic curve."""
    key = _load(path, serialization.load_ssh_public_key)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(f"{path}: not a key of an elliptic curve; {MADE}")
    return key


def _load(path: Path, load: Callable[[bytes], object]) -> object:
    try:
        return load(path.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path}: not a key that can be read ({error}); {MADE}") from error


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now, issuer_public = datetime.datetime.now().astimezone(), issuer_key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False)
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, format: serialization.PrivateFormat) -> None:
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, format, serialization.NoEncryption()))
