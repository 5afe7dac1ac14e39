"""Who is on the other side: TLS 1.3, both sides with a certificate of the transfer's own authority.

The private key never touches a disk: OpenSSL reads it through /proc from memory that has no name.
"""

from __future__ import annotations

import os
import ssl

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from agent.contract.errors import LandfallError, LinkLost, PeerRefused
from agent.contract.messages import TlsMaterial


def connecting(material: TlsMaterial) -> ssl.SSLContext:
    """Return the context of the side that connects (the source)."""
    return _context(material, ssl.PROTOCOL_TLS_CLIENT)


def listening(material: TlsMaterial) -> ssl.SSLContext:
    """Return the context of the side that listens (the target)."""
    context = _context(material, ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    return context


def check_peer(connection: ssl.SSLSocket, peer: str) -> None:
    """Refuse a peer whose certificate, already proved to be the authority's, is not ``peer``'s or not for its side of the connection."""
    raw = connection.getpeercert(binary_form=True)
    if raw is None:
        raise PeerRefused("the peer showed no certificate")
    usage = ExtendedKeyUsageOID.CLIENT_AUTH if connection.server_side else ExtendedKeyUsageOID.SERVER_AUTH
    names, usages = _facts(raw)
    if names != [peer]:
        raise PeerRefused(f"the peer's certificate is not that of {peer}", cause=f"it carries {', '.join(names) or 'no URI'}")
    if usages != [usage]:
        raise PeerRefused(f"the certificate of {peer} is not for this side of a connection")


def mapped(error: OSError, act: str) -> LandfallError:
    """Return the error that a failure of socket or TLS is: PeerRefused where it is about certificates, LinkLost for all else."""
    about_certificates = isinstance(error, ssl.SSLCertVerificationError) or (
        isinstance(error, ssl.SSLError)
        and any(word in (error.reason or "") for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "PROTOCOL_VERSION"))
    )
    if about_certificates:
        return PeerRefused(f"{act}: one side refused the other's certificate", cause=str(error))
    return LinkLost(f"{act} failed", cause=str(error))


def _context(material: TlsMaterial, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the node's URI is checked after the handshake; its address proves nothing
    context.verify_mode = ssl.CERT_REQUIRED
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(f"{material.certificate_pem}\n{material.key_pem}\n".encode())
        context.load_verify_locations(cadata=material.authority_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    except (ssl.SSLError, ValueError) as error:
        raise PeerRefused("this side's own certificate or key cannot be read", cause=type(error).__name__) from None
    finally:
        os.close(fd)
    return context


def _facts(raw: bytes) -> tuple[list[str], list[ObjectIdentifier]]:
    """Return the URIs and the extended key usages of a certificate."""
    certificate = x509.load_der_x509_certificate(raw)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise PeerRefused("the peer's certificate has no name or no usage", cause=str(error)) from error
    return names.get_values_for_type(x509.UniformResourceIdentifier), list(usages)
