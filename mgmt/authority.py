"""The private certificate authority: both sides of a transfer prove themselves with certificates made for it alone.

The authority's key never leaves the management node's state folder. Certificates live for hours, so revoking is not issuing. What a
certificate is good for stands in it: a URI that names node and role, and a usage that a client's and a server's do not share.
"""

from __future__ import annotations

import datetime
import secrets
import stat
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.contract.errors import ConfigInvalid
from agent.contract.messages import TlsMaterial
from agent.system.clock import wall_ns
from agent.system.files import write_durably

LIFETIME: Final = datetime.timedelta(hours=6)
CLOCKS_DIFFER: Final = datetime.timedelta(hours=1)
"""Certificates are good from this long ago, so that a node whose clock is behind takes them."""
AUTHORITY_LIFETIME: Final = datetime.timedelta(days=3650)


class Side(StrEnum):
    """The two ends of a transfer."""

    SENDER = "sender"  # connects: a TLS client
    RECEIVER = "receiver"  # listens: a TLS server


@dataclass(frozen=True, slots=True)
class Passes:
    """What both ends of one transfer are given."""

    sender: TlsMaterial
    receiver: TlsMaterial
    token: str = field(repr=False)  # single use


def uri(node: str, side: Side) -> str:
    """Return the identity that a certificate carries."""
    return f"landfall://{node}/{side}"


class Authority:
    """The authority whose key and certificate lie in ``folder``; made there the first time.

    If we die between key and certificate, the next start makes both anew: nothing was issued yet.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key_path, certificate_path = folder / "authority.key", folder / "authority.crt"
        if not certificate_path.exists():
            _found(key_path, certificate_path)
        if stat.S_IMODE(key_path.stat().st_mode) & 0o077:
            raise ConfigInvalid("the key of the certificate authority can be read by others", cause=str(key_path), fix="chmod 600 it.")
        try:
            key = load_pem_private_key(key_path.read_bytes(), password=None)
            self._certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        except (ValueError, OSError) as error:
            raise ConfigInvalid("the certificate authority cannot be read", cause=str(error)) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigInvalid("the key of the certificate authority is of another kind", cause=str(key_path))
        self._key = key

    @property
    def certificate_pem(self) -> str:
        """The authority's own certificate."""
        return self._certificate.public_bytes(Encoding.PEM).decode()

    @property
    def days_left(self) -> float:
        """For how long its certificates are taken."""
        now = datetime.datetime.fromtimestamp(wall_ns() // 10**9, datetime.UTC)
        return (self._certificate.not_valid_after_utc - now) / datetime.timedelta(days=1)

    def passes(self, sender: str, receiver: str) -> Passes:
        """Return what both ends of one session of one transfer prove themselves with; nothing of it is kept here."""
        return Passes(
            sender=self._material(sender, Side.SENDER, uri(receiver, Side.RECEIVER)),
            receiver=self._material(receiver, Side.RECEIVER, uri(sender, Side.SENDER)),
            token=secrets.token_hex(16),
        )

    def _material(self, node: str, side: Side, peer: str) -> TlsMaterial:
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if side is Side.SENDER else ExtendedKeyUsageOID.SERVER_AUTH
        issuer_key = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            _builder(node, LIFETIME)
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri(node, side))]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return TlsMaterial(self.certificate_pem, certificate.public_bytes(Encoding.PEM).decode(), _pem(key).decode(), peer)


def _found(key_path: Path, certificate_path: Path) -> None:
    """Make the authority: its key first, its certificate last."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"Landfall authority {secrets.token_hex(4)}")
    certificate = (
        _builder("", AUTHORITY_LIFETIME)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_durably(key_path, _pem(key))
    write_durably(certificate_path, certificate.public_bytes(Encoding.PEM))


def _builder(node: str, lifetime: datetime.timedelta) -> x509.CertificateBuilder:
    now = datetime.datetime.fromtimestamp(wall_ns() // 10**9, datetime.UTC)
    builder = x509.CertificateBuilder().serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - CLOCKS_DIFFER).not_valid_after(now + lifetime)
    return builder.subject_name(_name(node)) if node else builder


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Landfall"), x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
