"""The fleet's certificate authority, the server's certificate, and the devices' keys.

Everything is PEM on disk. Certificates are on P-256 and pass Python's strict checks (VERIFY_X509_STRICT); a device's
key is on P-384 in OpenSSH's format, which is what Flower's node authentication reads.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgen_app.errors import SettingsError

# A device whose clock is a little behind must not find a new certificate "not yet valid".
BACKDATED = timedelta(hours=1)
DAY = timedelta(days=1)
LOCAL = ("localhost", "127.0.0.1")  # by which the proxy and the operator on the server itself reach the SuperLink


def new_key() -> bytes:
    """A private key for a certificate: P-256, PKCS #8, unencrypted."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_device_key() -> bytes:
    """A private key for a SuperNode: P-384, OpenSSH, unencrypted."""
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def device_public_key(private: bytes, device: str) -> bytes:
    """The line that ``flwr supernode register`` reads, with the device's id as comment.

    Raises:
        SettingsError: the private key is none, or not on the curve that Flower wants.
    """
    try:
        key = serialization.load_ssh_private_key(private, None)
    except ValueError as error:
        raise SettingsError(f"the key of device {device} is damaged: {error}; make another with --new-key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise SettingsError(f"the key of device {device} is not on P-384; make another with --new-key {device}")
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {device}\n".encode()


def authority(key: bytes, name: str, days: int, now: datetime | None = None) -> bytes:
    """A certificate of the fleet's own authority; made anew from the same key, it verifies the same certificates."""
    private = load_key(key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"FedGen-Edge {name} CA")])
    usage = x509.KeyUsage(
        **dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
            False,
        ),
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = _builder(subject, subject, private.public_key(), days, now)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    return _signed(builder, private)


def server_certificate(
    ca: bytes, ca_key: bytes, key: bytes, hosts: Sequence[str], days: int, now: datetime | None = None
) -> bytes:
    """A certificate for the server's names and addresses, and for the machine itself (`LOCAL`)."""
    issuer, issuer_key, private = x509.load_pem_x509_certificate(ca), load_key(ca_key), load_key(key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *LOCAL))]
    builder = _builder(subject, issuer.subject, private.public_key(), days, now)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return _signed(builder.add_extension(identifier, critical=False), issuer_key)


def days_left(certificate: bytes, now: datetime | None = None) -> int:
    """Whole days until a certificate ends; negative: it has ended."""
    ends = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    return (ends - (now or datetime.now(UTC))) // DAY


def hosts_of(certificate: bytes) -> set[str]:
    """The names and addresses that a certificate is for."""
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    dns, addresses = x509.DNSName, x509.IPAddress
    return {*names.value.get_values_for_type(dns), *map(str, names.value.get_values_for_type(addresses))}


def same_hosts(certificate: bytes, hosts: Iterable[str]) -> bool:
    """Whether a certificate is for exactly these, written in whatever way."""
    return hosts_of(certificate) == {_canonical(host) for host in (*hosts, *LOCAL)}


def belongs_to(certificate: bytes, key: bytes) -> bool:
    """Whether a certificate is for this private key; damaged ones are not."""
    try:
        return x509.load_pem_x509_certificate(certificate).public_key() == load_key(key).public_key()
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _canonical(host: str) -> str:
    return str(ipaddress.ip_address(host)) if is_address(host) else host


def _general_name(host: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(host)) if is_address(host) else x509.DNSName(host)


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """What `new_key` made; ValueError: it is none."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (TypeError, UnsupportedAlgorithm) as error:  # one with a password, one of a kind that OpenSSL lacks
        raise ValueError(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"a {type(key).__name__}, not on an elliptic curve")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, now: datetime | None = None
) -> x509.CertificateBuilder:
    now = now or datetime.now(UTC)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - BACKDATED).not_valid_after(now + days * DAY)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
