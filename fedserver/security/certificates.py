"""How a certificate of the federation looks: ECDSA P-256, SHA-256, X.509 v3."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.addresses import check_host
from fedcore.errors import InvalidInput
from fedcore.identity import Identity, Role

# Clocks of clients may be behind the server's by this much.
BACKDATED_S = 300
_MAX_HOSTS = 64

_USAGE = {
    Role.SERVER: ExtendedKeyUsageOID.SERVER_AUTH,
    Role.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH,
    Role.OPERATOR: ExtendedKeyUsageOID.CLIENT_AUTH,
}


def new_ca(key: ec.EllipticCurvePrivateKey, federation: str, now_s: float, lifetime_s: float) -> x509.Certificate:
    """Return a self-signed CA certificate, which may sign leaves only."""
    name = _name("certificate authority", federation)
    builder = _builder(name, name, key.public_key(), now_s, now_s + lifetime_s)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(ca=True), critical=True)
    return builder.sign(key, hashes.SHA256())


def new_leaf(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    identity: Identity,
    now_s: float,
    lifetime_s: float,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """Return a certificate for `identity`, signed by the CA; it never outlives the CA.

    Args:
        ca: the authority's certificate.
        ca_key: the authority's key.
        public_key: of the holder.
        identity: goes into the subject (for people) and the URI (for us).
        now_s: seconds since 1970 (UTC).
        lifetime_s: from `now_s` on; the certificate is valid a little before as well, for clocks that are behind.
        hosts: DNS names and IP addresses under which a server is dialled.
    """
    until_s = min(now_s + lifetime_s, ca.not_valid_after_utc.timestamp())
    subject = _name(identity.role.value, identity.name)
    names = [x509.UniformResourceIdentifier(identity.uri), *map(_general_name, hosts)]
    builder = _builder(subject, ca.subject, public_key, now_s, until_s)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(ca=False), True),
        (x509.ExtendedKeyUsage([_USAGE[identity.role]]), False),
        (x509.SubjectAlternativeName(names), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(ca_key, hashes.SHA256())


def check_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """Return `hosts` without repetitions.

    Raises:
        InvalidInput: there are none, more than 64, or one is neither a DNS name nor an IP address.
    """
    unique = tuple(dict.fromkeys(check_host(host) for host in hosts))
    if not 1 <= len(unique) <= _MAX_HOSTS:
        raise InvalidInput(f"a server certificate needs 1 to {_MAX_HOSTS} host names, not {len(unique)}")
    return unique


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the DNS names and IP addresses in a certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = (str(address) for address in names.get_values_for_type(x509.IPAddress))
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def pem(certificate: x509.Certificate) -> bytes:
    """Return the certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the key as unencrypted PKCS #8 PEM: the file mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host.removesuffix("."))


def _name(unit: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Roundtable"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now_s: float,
    until_s: float,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=public_key)
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(int(now_s) - BACKDATED_S, UTC))
        .not_valid_after(datetime.fromtimestamp(int(until_s), UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
