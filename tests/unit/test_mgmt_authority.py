"""Certificates: what they say, that OpenSSL takes them for their side only, and that the key is nobody else's."""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.contract.errors import ConfigInvalid
from agent.contract.messages import TlsMaterial
from mgmt.authority import Authority, Side, uri


def context(material: TlsMaterial, purpose: ssl.Purpose, folder: Path) -> ssl.SSLContext:
    made = ssl.create_default_context(purpose, cadata=material.authority_pem)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    (folder / "pem").write_text(material.certificate_pem + material.key_pem)
    made.load_cert_chain(folder / "pem")
    return made


def handshake(client: TlsMaterial, server: TlsMaterial, folder: Path) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = context(client, ssl.Purpose.SERVER_AUTH, folder).wrap_bio(to_client, to_server)
    other = context(server, ssl.Purpose.CLIENT_AUTH, folder).wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (one, other):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    other.getpeercert()
    return one, other


def test_both_sides_take_each_other_and_see_who_it_is(tmp_path: Path) -> None:
    passes = Authority(tmp_path / "ca").passes("nas1", "nas2")
    client, server = handshake(passes.sender, passes.receiver, tmp_path)
    seen = server.getpeercert()
    assert seen
    assert seen["subjectAltName"] == (("URI", "landfall://nas1/sender"),)
    assert passes.receiver.peer == "landfall://nas1/sender"
    shown = client.getpeercert()
    assert shown
    assert shown["subjectAltName"] == (("URI", passes.sender.peer),)
    assert client.version() == "TLSv1.3"


def test_J4_a_certificate_is_no_good_for_the_other_side_nor_from_another_authority(tmp_path: Path) -> None:
    passes = Authority(tmp_path / "ca").passes("nas1", "nas2")
    strangers = Authority(tmp_path / "other").passes("nas1", "nas2")
    with pytest.raises(ssl.SSLError):
        handshake(passes.receiver, passes.receiver, tmp_path)
    with pytest.raises(ssl.SSLError):
        handshake(passes.sender, passes.sender, tmp_path)
    with pytest.raises(ssl.SSLError):
        handshake(replace(strangers.sender, authority_pem=passes.sender.authority_pem), passes.receiver, tmp_path)


def test_a_certificate_says_hours_and_one_use(tmp_path: Path) -> None:
    passes = Authority(tmp_path / "ca").passes("nas1", "nas2")
    for material, usage in ((passes.sender, ExtendedKeyUsageOID.CLIENT_AUTH), (passes.receiver, ExtendedKeyUsageOID.SERVER_AUTH)):
        certificate = x509.load_pem_x509_certificate(material.certificate_pem.encode())
        assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds() <= 24 * 3600
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert uri("nas2", Side.RECEIVER) == passes.sender.peer


def test_the_authority_is_made_once_and_every_pass_is_new(tmp_path: Path) -> None:
    first, second = Authority(tmp_path), Authority(tmp_path)
    assert first.certificate_pem == second.certificate_pem
    one, other = first.passes("nas1", "nas2"), first.passes("nas1", "nas2")
    assert one.token != other.token
    assert len(bytes.fromhex(one.token)) == 16
    assert one.sender.key_pem != other.sender.key_pem
    assert one.sender.key_pem not in repr(one)


def test_J14_the_key_is_for_root_alone_and_refused_otherwise(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        Authority(tmp_path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "authority.key").stat().st_mode) == 0o600
    (tmp_path / "authority.key").chmod(0o640)
    with pytest.raises(ConfigInvalid):
        Authority(tmp_path)
