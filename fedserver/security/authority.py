"""The federation's certificate authority: one folder, six files.

``ca.pem ca.key``, ``server.pem server.key``, ``operator.pem operator.key``. Keys never change; certificates of the
server and of the operator are renewed in place, one file each, so that a crash leaves no pair that does not fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.errors import InvalidInput, NotFound, Refused, StateUnusable, Unauthenticated
from fedcore.identity import Identity, Role, identity_of, is_issued_by, load_certificate, utc
from fedcore.privatefiles import make_private_folder, read_private, write_private
from fedserver.security.certificates import check_hosts, hosts_of, key_pem, new_ca, new_leaf, pem

DAY_S: Final = 86400.0
CA_LIFETIME_S: Final = 3650 * DAY_S
SERVER_LIFETIME_S: Final = 365 * DAY_S
OPERATOR_LIFETIME_S: Final = 365 * DAY_S
CLIENT_LIFETIME_S: Final = 90 * DAY_S
RENEW_BEFORE_S: Final = 30 * DAY_S
_MAX_REQUEST_BYTES = 8192


@dataclass(frozen=True)
class _Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Authority:
    """Signs certificates, and holds what the server and the operator show in TLS.

    Made by `create` or `load`. Methods may be called from any thread, except that `renew` and `set_hosts` must not
    overlap one another.
    """

    def __init__(self, folder: Path, ca: _Pair, server: _Pair, operator: _Pair, wall_s: Callable[[], float]) -> None:
        self._folder = folder
        self._ca = ca
        self._server = server
        self._operator = operator
        self._wall_s = wall_s
        self.federation = identity_of(server.certificate).federation

    @classmethod
    def create(
        cls, folder: Path, federation: str, hosts: Sequence[str], *, wall_s: Callable[[], float] = time.time
    ) -> Authority:
        """Make a new authority in `folder` (mode 0700, files 0600) and return it.

        Args:
            folder: may exist, but must hold no authority.
            federation: the name of the federation.
            hosts: DNS names and IP addresses under which clients dial the server.
            wall_s: the wall clock.

        Raises:
            Refused: the folder holds an authority already.
            InvalidInput: the federation's name or a host is not valid.
            StorageFailed: the files cannot be written.
        """
        server_identity = Identity(federation, Role.SERVER, "server")
        operator_identity = Identity(federation, Role.OPERATOR, "operator")
        hosts = check_hosts(hosts)
        for name in ("ca.pem", "ca.key"):
            if (folder / name).exists():
                raise Refused(f"{folder} already holds a certificate authority ({name}); it is not overwritten")
        now_s = wall_s()
        ca_key, server_key, operator_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        ca = _Pair(new_ca(ca_key, federation, now_s, CA_LIFETIME_S), ca_key)
        server = _Pair(
            new_leaf(
                ca.certificate,
                ca_key,
                server_key.public_key(),
                server_identity,
                now_s,
                SERVER_LIFETIME_S,
                hosts,
            ),
            server_key,
        )
        operator = _Pair(
            new_leaf(
                ca.certificate,
                ca_key,
                operator_key.public_key(),
                operator_identity,
                now_s,
                OPERATOR_LIFETIME_S,
            ),
            operator_key,
        )
        make_private_folder(folder)
        # The CA's own files come last: before them there is no authority, and a crash leaves a folder to start over in.
        for name, pair in (("server", server), ("operator", operator), ("ca", ca)):
            write_private(folder / f"{name}.key", key_pem(pair.key))
            write_private(folder / f"{name}.pem", pem(pair.certificate))
        return cls(folder, ca, server, operator, wall_s)

    @classmethod
    def load(cls, folder: Path, *, wall_s: Callable[[], float] = time.time) -> Authority:
        """Return the authority in `folder`; renews the server's and the operator's certificate where it is time.

        Raises:
            StateUnusable: a file is missing, unreadable or damaged, or the files do not belong together, or the
                authority's own certificate is not valid now.
            StorageFailed: a renewed certificate cannot be written.
        """
        ca, server, operator = (_read_pair(folder, name) for name in ("ca", "server", "operator"))
        _check_ca(folder, ca, wall_s())
        server_identity = _check_leaf(folder, "server", server, ca, Role.SERVER)
        operator_identity = _check_leaf(folder, "operator", operator, ca, Role.OPERATOR)
        if server_identity.federation != operator_identity.federation:
            raise StateUnusable(f"{folder}: server.pem and operator.pem are of different federations")
        authority = cls(folder, ca, server, operator, wall_s)
        authority.renew()
        return authority

    def renew(self) -> bool:
        """Renew the server's and the operator's certificate if they have less than 30 days left; say whether one was.

        A running server must build its TLS credentials anew after True.

        Raises:
            StorageFailed: a renewed certificate cannot be written.
        """
        server, operator = self._server.certificate, self._operator.certificate
        if renew_server := self._is_due(server):
            self._replace_server(hosts_of(server))
        if renew_operator := self._is_due(operator):
            leaf = self._leaf(self._operator, OPERATOR_LIFETIME_S)
            write_private(self._folder / "operator.pem", pem(leaf))
            self._operator = _Pair(leaf, self._operator.key)
        return renew_server or renew_operator

    def set_hosts(self, hosts: Sequence[str]) -> None:
        """Give the server a new certificate for `hosts`.

        Raises:
            InvalidInput: a host is neither a DNS name nor an IP address.
            StorageFailed: the certificate cannot be written.
        """
        self._replace_server(check_hosts(hosts))

    def sign_client(self, csr_pem: bytes, name: str, lifetime_s: float = CLIENT_LIFETIME_S) -> x509.Certificate:
        """Return a certificate for the client `name` and the key in the request.

        Every name and extension in the request is ignored: who the client is was decided when its token was issued.

        Args:
            csr_pem: PKCS #10 request in PEM, at most 8 KiB; hostile.
            name: the client's name, from the token.
            lifetime_s: how long the certificate is valid; it never outlives the authority.

        Raises:
            InvalidInput: the request is malformed, or its key is not ECDSA P-256, or `name` or `lifetime_s` is bad.
            Unauthenticated: the request is not signed by the key in it.
        """
        if not (math.isfinite(lifetime_s) and 0 < lifetime_s <= CA_LIFETIME_S):
            raise InvalidInput(f"a certificate lifetime of {lifetime_s} s is not in (0, {CA_LIFETIME_S:.0f}] s")
        identity = Identity(self.federation, Role.CLIENT, name)
        public_key = _requested_key(csr_pem)
        ca = self._ca
        return new_leaf(ca.certificate, ca.key, public_key, identity, self._wall_s(), lifetime_s)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The DNS names and IP addresses in the server's certificate."""
        return hosts_of(self._server.certificate)

    @property
    def ca_pem(self) -> bytes:
        """The authority's certificate: the only root that anybody in the federation trusts."""
        return pem(self._ca.certificate)

    @property
    def server_key_pem(self) -> bytes:
        """The server's TLS key."""
        return key_pem(self._server.key)

    @property
    def server_chain_pem(self) -> bytes:
        """The server's certificate."""
        return pem(self._server.certificate)

    @property
    def operator_key_pem(self) -> bytes:
        """The operator's TLS key."""
        return key_pem(self._operator.key)

    @property
    def operator_chain_pem(self) -> bytes:
        """The operator's certificate."""
        return pem(self._operator.certificate)

    def _is_due(self, certificate: x509.Certificate) -> bool:
        until_s = certificate.not_valid_after_utc.timestamp()
        # Near its own end the authority cannot give more time, and trying at each start would change nothing.
        can_extend = until_s < self._ca.certificate.not_valid_after_utc.timestamp()
        return can_extend and until_s - self._wall_s() < RENEW_BEFORE_S

    def _replace_server(self, hosts: Sequence[str]) -> None:
        leaf = self._leaf(self._server, SERVER_LIFETIME_S, hosts)
        write_private(self._folder / "server.pem", pem(leaf))
        self._server = _Pair(leaf, self._server.key)

    def _leaf(self, pair: _Pair, lifetime_s: float, hosts: Sequence[str] = ()) -> x509.Certificate:
        identity, public_key = identity_of(pair.certificate), pair.key.public_key()
        ca = self._ca
        return new_leaf(ca.certificate, ca.key, public_key, identity, self._wall_s(), lifetime_s, hosts)


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    if len(csr_pem) > _MAX_REQUEST_BYTES:
        raise InvalidInput(f"the signing request has {len(csr_pem)} bytes; the bound is {_MAX_REQUEST_BYTES}")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        public_key = request.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise InvalidInput("the signing request is not a PKCS #10 request in PEM with a known key") from error
    # The key's kind is looked at before its signature: no arithmetic on a 16384-bit key of somebody's choice.
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or public_key.curve.name != "secp256r1":
        raise InvalidInput("the signing request's key is not ECDSA P-256")
    try:
        is_signed = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput("the signing request is signed with an unknown algorithm") from error
    if not is_signed:
        raise Unauthenticated("the signing request is not signed by the key in it")
    return public_key


def _read_pair(folder: Path, name: str) -> _Pair:
    try:
        certificate_data, key_data = (read_private(folder / f"{name}{suffix}") for suffix in (".pem", ".key"))
    except NotFound as error:
        raise StateUnusable(f"no complete certificate authority: {error}; `fedserver init` makes one") from error
    try:
        certificate = load_certificate(certificate_data)
    except InvalidInput as error:
        raise StateUnusable(f"{folder / f'{name}.pem'} is damaged: {error}") from error
    try:
        key = serialization.load_pem_private_key(key_data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StateUnusable(f"{folder / f'{name}.key'} is damaged: not an unencrypted key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateUnusable(f"{folder / f'{name}.key'} is not an ECDSA key")
    if key.public_key() != certificate.public_key():
        raise StateUnusable(f"{folder}: {name}.key is not the key of {name}.pem")
    return _Pair(certificate, key)


def _check_ca(folder: Path, ca: _Pair, now_s: float) -> None:
    try:
        constraints = ca.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise StateUnusable(f"{folder}: ca.pem is not a CA certificate") from error
    if not (constraints.ca and is_issued_by(ca.certificate, ca.certificate)):
        raise StateUnusable(f"{folder}: ca.pem is not a self-signed CA certificate")
    valid_from_s = ca.certificate.not_valid_before_utc.timestamp()
    valid_until_s = ca.certificate.not_valid_after_utc.timestamp()
    if now_s < valid_from_s:
        raise StateUnusable(f"{folder}: ca.pem is not valid before {utc(valid_from_s)}; is this machine's clock right?")
    if now_s >= valid_until_s:
        raise StateUnusable(f"{folder}: ca.pem expired at {utc(valid_until_s)}; the federation needs a new authority")


def _check_leaf(folder: Path, name: str, leaf: _Pair, ca: _Pair, role: Role) -> Identity:
    if not is_issued_by(leaf.certificate, ca.certificate):
        raise StateUnusable(f"{folder}: {name}.pem is not signed by ca.pem")
    try:
        identity = identity_of(leaf.certificate)
    except Unauthenticated as error:
        raise StateUnusable(f"{folder}: {name}.pem: {error}") from error
    if identity.role is not role:
        raise StateUnusable(f"{folder}: {name}.pem is a certificate of {identity.uri}, not of the {role.value}")
    return identity
