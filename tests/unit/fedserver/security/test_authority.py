from __future__ import annotations

import base64
import ipaddress
import shutil
import stat
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidInput, Refused, StateUnusable, Unauthenticated
from fedcore.identity import Identity, Role, certificate_request, identity_of, is_issued_by
from fedserver.security.authority import CA_LIFETIME_S, DAY_S, Authority
from fedserver.security.certificates import new_leaf

NOW_S = 1_800_000_000.0
HOSTS = ["fl.example.org", "10.1.2.3", "::1"]
FILES = ["ca.key", "ca.pem", "operator.key", "operator.pem", "server.key", "server.pem"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authority") / "ca"
    Authority.create(folder, "hospitals", HOSTS, wall_s=lambda: NOW_S)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "ca"))


@pytest.fixture
def authority(made: Path) -> Authority:
    return Authority.load(made, wall_s=lambda: NOW_S)


def load_at(folder: Path, now_s: float) -> Authority:
    return Authority.load(folder, wall_s=lambda: now_s)


def x(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def request(name: str = "alice", federation: str = "hospitals") -> bytes:
    return certificate_request(ec.generate_private_key(ec.SECP256R1()), Identity(federation, Role.CLIENT, name))


# --- what is made ---------------------------------------------------------------------------------------------------


def test_the_folder_and_its_files_are_the_owners_alone(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == FILES
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o600}


def test_what_was_made_is_what_is_loaded(made: Path, authority: Authority) -> None:
    assert authority.federation == "hospitals"
    assert authority.ca_pem == (made / "ca.pem").read_bytes()
    assert authority.server_chain_pem == (made / "server.pem").read_bytes()
    assert authority.server_key_pem == (made / "server.key").read_bytes()
    assert authority.operator_chain_pem == (made / "operator.pem").read_bytes()
    assert authority.operator_key_pem == (made / "operator.key").read_bytes()
    assert authority.hosts == ("fl.example.org", "10.1.2.3", "::1")


def test_each_certificate_may_do_its_own_work_and_no_other(authority: Authority) -> None:
    client_pem = authority.sign_client(request(), "alice").public_bytes(serialization.Encoding.PEM)
    for pem, role, usage in (
        (authority.server_chain_pem, Role.SERVER, ExtendedKeyUsageOID.SERVER_AUTH),
        (authority.operator_chain_pem, Role.OPERATOR, ExtendedKeyUsageOID.CLIENT_AUTH),
        (client_pem, Role.CLIENT, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        leaf = x(pem)
        assert identity_of(leaf).role is role
        assert is_issued_by(leaf, x(authority.ca_pem))
        assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (constraints.critical, constraints.value.ca) == (True, False)
        key_usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
        assert (key_usage.critical, key_usage.value.digital_signature, key_usage.value.key_cert_sign) == (
            True,
            True,
            False,
        )
        assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)
    ca = x(authority.ca_pem)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)


def test_the_server_is_named_by_its_hosts(authority: Authority) -> None:
    names = x(authority.server_chain_pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names) == {
        x509.UniformResourceIdentifier("roundtable://hospitals/server"),
        x509.DNSName("fl.example.org"),
        x509.IPAddress(ipaddress.ip_address("10.1.2.3")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    }


def test_lifetimes_start_five_minutes_ago(authority: Authority) -> None:
    client = authority.sign_client(request(), "alice", 600.0)
    for certificate, seconds in (
        (x(authority.ca_pem), 3650 * DAY_S),
        (x(authority.server_chain_pem), 365 * DAY_S),
        (x(authority.operator_chain_pem), 365 * DAY_S),
        (client, 600.0),
        (authority.sign_client(request(), "alice"), 90 * DAY_S),
    ):
        assert certificate.not_valid_before_utc.timestamp() == NOW_S - 300
        assert certificate.not_valid_after_utc.timestamp() == NOW_S + seconds


def test_an_authority_is_never_overwritten(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Refused, match=r"already holds a certificate authority \(ca\.pem\)"):
        Authority.create(folder, "other", HOSTS)
    (folder / "ca.pem").rename(folder / "lost")
    with pytest.raises(Refused, match=r"ca\.key"):
        Authority.create(folder, "other", HOSTS)
    (folder / "lost").rename(folder / "ca.pem")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_start_that_was_cut_short_can_be_repeated(folder: Path) -> None:
    (folder / "ca.pem").unlink()
    (folder / "ca.key").unlink()
    Authority.create(folder, "second", ["localhost"], wall_s=lambda: NOW_S)
    assert load_at(folder, NOW_S).federation == "second"


@pytest.mark.parametrize(
    ("federation", "hosts", "text"),
    [
        ("a/b", HOSTS, "federation 'a/b' is not valid"),
        ("f", [], "needs 1 to 64 host names, not 0"),
        ("f", ["*.example.org"], "neither a DNS name nor"),
        ("f", ["0.0.0.0"], "address to listen on"),
        ("f", [f"h{i}" for i in range(65)], "not 65"),
    ],
)
def test_a_bad_name_makes_no_authority(tmp_path: Path, federation: str, hosts: list[str], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Authority.create(tmp_path / "ca", federation, hosts)
    assert not (tmp_path / "ca").exists()


# --- what cannot be loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StateUnusable, match=rf"{name} is missing; `fedserver init`"):
        load_at(folder, NOW_S)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"-----BEGIN CERTIFICATE-----\nAAAA\n", b"x" * 70_000])
def test_a_damaged_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(StateUnusable, match=rf"{name} is damaged"):
        load_at(folder, NOW_S)


@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(StateUnusable, match=rf"cannot read .*{name}"):
        load_at(folder, NOW_S)


@pytest.mark.parametrize("name", ["ca", "server", "operator"])
def test_a_key_of_another_certificate_is_noticed(folder: Path, name: str) -> None:
    other = "server" if name == "ca" else "ca"
    shutil.copy(folder / f"{other}.key", folder / f"{name}.key")
    with pytest.raises(StateUnusable, match=rf"{name}\.key is not the key of {name}\.pem"):
        load_at(folder, NOW_S)


def test_files_of_two_authorities_are_noticed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    Authority.create(other, "hospitals", HOSTS, wall_s=lambda: NOW_S)
    for name in ("server.pem", "server.key"):
        shutil.copy(other / name, folder / name)
    with pytest.raises(StateUnusable, match=r"server\.pem is not signed by ca\.pem"):
        load_at(folder, NOW_S)


def test_roles_cannot_be_exchanged(folder: Path) -> None:
    for suffix in ("pem", "key"):
        shutil.copy(folder / f"operator.{suffix}", folder / f"server.{suffix}")
    with pytest.raises(StateUnusable, match="operator/operator, not of the server"):
        load_at(folder, NOW_S)


def test_two_federations_under_one_root_are_noticed(folder: Path) -> None:
    ca_key, key = (
        serialization.load_pem_private_key((folder / name).read_bytes(), None) for name in ("ca.key", "operator.key")
    )
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    other = Identity("other", Role.OPERATOR, "operator")
    leaf = new_leaf(x((folder / "ca.pem").read_bytes()), ca_key, key.public_key(), other, NOW_S, 365 * DAY_S)
    (folder / "operator.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(StateUnusable, match="of different federations"):
        load_at(folder, NOW_S)


def test_a_key_of_another_kind_is_named(folder: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "ca.key").write_bytes(key)
    with pytest.raises(StateUnusable, match=r"ca\.key is not an ECDSA key"):
        load_at(folder, NOW_S)


def test_a_leaf_is_no_authority(folder: Path) -> None:
    for suffix in ("pem", "key"):
        shutil.copy(folder / f"server.{suffix}", folder / f"ca.{suffix}")
    with pytest.raises(StateUnusable, match="not a self-signed CA"):
        load_at(folder, NOW_S)


def test_an_authority_outside_its_time_is_refused(folder: Path) -> None:
    with pytest.raises(StateUnusable, match="is this machine's clock right"):
        load_at(folder, NOW_S - 301)
    with pytest.raises(StateUnusable, match="the federation needs a new authority"):
        load_at(folder, NOW_S + CA_LIFETIME_S)


# --- renewal --------------------------------------------------------------------------------------------------------


def test_certificates_are_renewed_in_their_last_thirty_days(folder: Path) -> None:
    before = load_at(folder, NOW_S + 335 * DAY_S)
    assert before.server_chain_pem == (folder / "server.pem").read_bytes()
    assert not before.renew()
    later_s = NOW_S + 335 * DAY_S + 1
    after = load_at(folder, later_s)
    for old, new in (
        (before.server_chain_pem, after.server_chain_pem),
        (before.operator_chain_pem, after.operator_chain_pem),
    ):
        assert x(new).not_valid_after_utc.timestamp() == later_s + 365 * DAY_S
        assert x(new).public_key() == x(old).public_key()
        assert identity_of(x(new)) == identity_of(x(old))
    assert after.hosts == before.hosts
    assert load_at(folder, later_s).server_chain_pem == after.server_chain_pem, "renewed once, not at every start"
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_a_long_running_server_can_renew(folder: Path) -> None:
    now_s = NOW_S
    authority = Authority.load(folder, wall_s=lambda: now_s)
    assert not authority.renew()
    now_s += 400 * DAY_S
    assert authority.renew()
    assert x(authority.server_chain_pem).not_valid_after_utc.timestamp() == now_s + 365 * DAY_S


def test_nothing_outlives_the_authority(folder: Path) -> None:
    near_s = NOW_S + CA_LIFETIME_S - 5 * DAY_S
    authority = load_at(folder, near_s)
    end = x(authority.ca_pem).not_valid_after_utc
    assert x(authority.server_chain_pem).not_valid_after_utc == end
    assert authority.sign_client(request(), "alice").not_valid_after_utc == end
    assert not authority.renew()


def test_hosts_can_be_changed(folder: Path) -> None:
    load_at(folder, NOW_S).set_hosts(["new.example.org", "new.example.org"])
    assert load_at(folder, NOW_S).hosts == ("new.example.org",)


# --- clients --------------------------------------------------------------------------------------------------------


def forged_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, "operator"),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "certificate authority"),
            ]
        )
    )
    names = [
        x509.UniformResourceIdentifier("roundtable://hospitals/operator/operator"),
        x509.DNSName("fl.example.org"),
    ]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_what_a_request_asks_for_is_ignored(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    honest = authority.sign_client(certificate_request(key, Identity("x", Role.CLIENT, "y")), "alice", 60.0)
    forged = authority.sign_client(forged_request(key), "alice", 60.0)
    assert identity_of(forged) == Identity("hospitals", Role.CLIENT, "alice")
    assert forged.subject == honest.subject
    assert list(forged.extensions) == list(honest.extensions)
    assert forged.public_key() == key.public_key()
    assert forged.serial_number != honest.serial_number


def _pem_request(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["rsa", "p384", "secp256k1", "ed25519"],
)
def test_only_p256_keys_are_certified(
    authority: Authority, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
) -> None:
    with pytest.raises(InvalidInput, match="not ECDSA P-256"):
        authority.sign_client(_pem_request(key), "alice", 60.0)


def _der(pem: bytes) -> bytes:
    return x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)


def test_a_request_for_somebody_elses_key_is_refused(authority: Authority) -> None:
    mine, theirs = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    points = [
        key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        for key in (mine, theirs)
    ]
    stolen = _der(_pem_request(mine)).replace(points[0], points[1])
    pem = _pem(stolen)
    with pytest.raises(Unauthenticated, match="not signed by the key in it"):
        authority.sign_client(pem, "alice", 60.0)


def _pem(der: bytes) -> bytes:
    body = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.filterwarnings("ignore:Attribute's length")
@given(position=st.integers(0), value=st.integers(0, 255))
def test_a_damaged_request_gets_no_certificate(made: Path, position: int, value: int) -> None:
    authority = load_at(made, NOW_S)
    good = _der(forged_request(ec.generate_private_key(ec.SECP256R1())))
    bad = bytearray(good)
    bad[position % len(bad)] = value
    if bytes(bad) != good:
        with pytest.raises((InvalidInput, Unauthenticated)):
            authority.sign_client(_pem(bytes(bad)), "alice", 60.0)


@given(st.binary())
def test_arbitrary_bytes_get_no_certificate(made: Path, data: bytes) -> None:
    authority = load_at(made, NOW_S)
    for text in (data, _pem(data)):
        with pytest.raises(InvalidInput):
            authority.sign_client(text, "alice", 60.0)


def test_bounds_of_a_request(authority: Authority) -> None:
    with pytest.raises(InvalidInput, match="has 8193 bytes; the bound is 8192"):
        authority.sign_client(request().ljust(8193), "alice", 60.0)
    for lifetime_s in (0.0, -1.0, float("nan"), float("inf"), CA_LIFETIME_S + 1):
        with pytest.raises(InvalidInput, match="lifetime"):
            authority.sign_client(request(), "alice", lifetime_s)
    with pytest.raises(InvalidInput, match="client name"):
        authority.sign_client(request(), "../operator/x", 60.0)


# --- an independent opinion -----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_openssl_agrees(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", "hospitals", HOSTS, wall_s=time.time)
    client = tmp_path / "client.pem"
    client.write_bytes(authority.sign_client(forged_request(_KEY), "alice").public_bytes(serialization.Encoding.PEM))
    ca, server, operator = (tmp_path / "ca" / f"{name}.pem" for name in ("ca", "server", "operator"))

    def openssl(*arguments: str | Path) -> tuple[int, str]:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=30, check=False)
        return done.returncode, done.stdout + done.stderr

    strict = ("verify", "-x509_strict", "-check_ss_sig", "-CAfile", ca)
    for leaf, purpose, wrong in (
        (server, "sslserver", "sslclient"),
        (operator, "sslclient", "sslserver"),
        (client, "sslclient", "sslserver"),
    ):
        assert openssl(*strict, "-purpose", purpose, leaf)[0] == 0
        assert openssl(*strict, "-purpose", wrong, leaf)[0] != 0
        assert openssl("verify", "-partial_chain", "-CAfile", leaf, operator)[0] == (0 if leaf == operator else 2)
    for host, flag in (("fl.example.org", "-verify_hostname"), ("10.1.2.3", "-verify_ip"), ("::1", "-verify_ip")):
        assert openssl(*strict, flag, host, server)[0] == 0
        assert openssl(*strict, flag, host, client)[0] != 0
    assert openssl(*strict, "-verify_hostname", "evil.example.org", server)[0] != 0
    text = openssl("x509", "-noout", "-text", "-in", client)[1]
    for part in (
        "URI:roundtable://hospitals/client/alice",
        "CA:FALSE",
        "ecdsa-with-SHA256",
        "prime256v1",
        "Version: 3",
    ):
        assert part in text
    assert "DNS:" not in text
    assert datetime.now(UTC) < x(client.read_bytes()).not_valid_after_utc


_KEY = ec.generate_private_key(ec.SECP256R1())
