from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedclient.identity import ClientIdentity, IdentityRequest, new_request, prepare_folder
from fedcore.errors import InvalidInput, NotFound, Refused, StateUnusable, StorageFailed, Unauthenticated
from fedcore.identity import ENROLMENT_CONTEXT, verify
from fedserver.security.authority import CA_LIFETIME_S, Authority

NOW_S = 1_800_000_000.0
FILES = ["ca.pem", "certificate.pem", "identity.json", "key.pem", "signing.key"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("a") / "ca", "f", ["localhost"], wall_s=lambda: NOW_S)


def enrol(authority: Authority, request: IdentityRequest | None = None, name: str = "alice") -> ClientIdentity:
    request = request or new_request("alice", "f")
    certificate = authority.sign_client(request.csr_pem, name, 1000.0)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return request.complete(pem, server="fl.example.org:7400", ca_pem=authority.ca_pem, now_s=NOW_S)


@pytest.fixture
def identity(authority: Authority) -> ClientIdentity:
    return enrol(authority)


@pytest.fixture
def folder(identity: ClientIdentity, tmp_path: Path) -> Path:
    identity.save(tmp_path / "id")
    return tmp_path / "id"


def test_what_is_saved_is_what_is_loaded(identity: ClientIdentity, folder: Path) -> None:
    loaded = ClientIdentity.load(folder)
    loaded.check(NOW_S)
    assert replace(loaded, signing_key=identity.signing_key) == identity
    assert loaded.signing_key.private_bytes_raw() == identity.signing_key.private_bytes_raw()
    assert loaded.expires_at == NOW_S + 1000


def test_the_files_are_the_owners_alone(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_no_key_is_shown(identity: ClientIdentity) -> None:
    request = new_request("alice", "f")
    for shown in (repr(identity), str(identity), repr(request)):
        assert "PRIVATE" not in shown
        assert "PrivateKey" not in shown
        assert "alice" in shown


def test_a_request_proves_both_keys() -> None:
    request = new_request("alice", "f")
    assert x509.load_pem_x509_csr(request.csr_pem).is_signature_valid
    verify(request.signing_public_key, ENROLMENT_CONTEXT, request.csr_pem, request.signing_key_proof)
    other = new_request("alice", "f")
    with pytest.raises(Unauthenticated):
        verify(request.signing_public_key, ENROLMENT_CONTEXT, other.csr_pem, request.signing_key_proof)
    with pytest.raises(Unauthenticated):
        verify(request.signing_public_key, b"roundtable-update-v1", request.csr_pem, request.signing_key_proof)


def test_a_request_for_no_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match="client name"):
        new_request("a/b", "f")


# --- replacing ------------------------------------------------------------------------------------------------------


def test_an_identity_is_replaced_only_by_force(authority: Authority, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    second = enrol(authority)
    for attempt in (second.save, prepare_folder):
        with pytest.raises(Refused, match="already holds a client identity; `--force` replaces it"):
            attempt(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    prepare_folder(folder, force=True)
    second.save(folder, force=True)
    assert ClientIdentity.load(folder).certificate_pem == second.certificate_pem


@pytest.mark.parametrize("blocked", [name for name in FILES if name != "identity.json"])
def test_a_replacement_that_fails_leaves_no_mixture(authority: Authority, folder: Path, blocked: str) -> None:
    (folder / blocked).unlink()
    (folder / blocked).mkdir()  # a file cannot be renamed over a folder
    with pytest.raises(StorageFailed, match=blocked):
        enrol(authority).save(folder, force=True)
    with pytest.raises(NotFound, match="run `fedclient enroll` first"):
        ClientIdentity.load(folder)


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_client_without_identity_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no client identity in .*: run `fedclient enroll` first"):
        ClientIdentity.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [name for name in FILES if name != "identity.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StateUnusable, match=rf"{name} is missing.*--force"):
        ClientIdentity.load(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 60_000, b"[]", b'{"server": 1}', b"x" * 70_000])
def test_a_damaged_file_is_named_before_dialling(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(StateUnusable, match=name):
        ClientIdentity.load(folder).check(NOW_S)


@pytest.mark.parametrize("change", [{"server": "nowhere"}, {"client": "../x"}, {"federation": ""}])
def test_a_bad_entry_is_named(folder: Path, change: dict[str, str]) -> None:
    marker = folder / "identity.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | change))
    with pytest.raises(StateUnusable, match=next(iter(change))):
        ClientIdentity.load(folder)


def test_a_tls_key_does_not_sign_updates(folder: Path) -> None:
    shutil.copy(folder / "key.pem", folder / "signing.key")
    with pytest.raises(StateUnusable, match=r"signing.key is not an Ed25519 key"):
        ClientIdentity.load(folder)


def test_a_signing_key_is_no_tls_key(folder: Path) -> None:
    shutil.copy(folder / "signing.key", folder / "key.pem")
    with pytest.raises(StateUnusable, match=r"key.pem is not an ECDSA key"):
        ClientIdentity.load(folder).check(NOW_S)


# --- checking -------------------------------------------------------------------------------------------------------


def test_an_expired_certificate_is_named_before_dialling(identity: ClientIdentity) -> None:
    identity.check(NOW_S + 999)
    with pytest.raises(Unauthenticated, match=r"this client's certificate expired at .*: ask the operator"):
        identity.check(NOW_S + 1000)


def test_a_wrong_clock_is_named_before_dialling(identity: ClientIdentity) -> None:
    identity.check(NOW_S - 300)
    with pytest.raises(Unauthenticated, match="is this machine's clock right"):
        identity.check(NOW_S - 301)


def test_an_expired_authority_is_named(authority: Authority, identity: ClientIdentity, tmp_path: Path) -> None:
    old = Authority.create(tmp_path / "old", "f", ["localhost"], wall_s=lambda: NOW_S - CA_LIFETIME_S)
    with pytest.raises(Unauthenticated, match="the authority's certificate expired"):
        replace(identity, ca_pem=old.ca_pem).check(NOW_S)


def test_a_foreign_authority_is_noticed(identity: ClientIdentity, tmp_path: Path) -> None:
    # Same names, another key: only the signature tells.
    foreign = Authority.create(tmp_path / "other", "f", ["localhost"], wall_s=lambda: NOW_S)
    with pytest.raises(Unauthenticated, match=r"not signed by the authority in ca\.pem"):
        replace(identity, ca_pem=foreign.ca_pem).check(NOW_S)


def test_another_clients_certificate_is_noticed(authority: Authority, identity: ClientIdentity) -> None:
    with pytest.raises(Unauthenticated, match=r"client/mallory, the identity file says .*client/alice"):
        enrol(authority, name="mallory")
    with pytest.raises(Unauthenticated, match=r"the identity file says roundtable://g/client/alice"):
        replace(identity, federation="g").check(NOW_S)


def test_a_certificate_for_another_key_is_noticed(authority: Authority, identity: ClientIdentity) -> None:
    with pytest.raises(Unauthenticated, match=r"key\.pem is not the key of certificate\.pem"):
        replace(identity, key_pem=enrol(authority).key_pem).check(NOW_S)


def test_an_operators_certificate_is_no_clients(authority: Authority, identity: ClientIdentity) -> None:
    with pytest.raises(Unauthenticated, match="operator/operator"):
        replace(identity, certificate_pem=authority.operator_chain_pem).check(NOW_S)


def test_a_reply_that_is_no_certificate_is_refused(authority: Authority) -> None:
    with pytest.raises(StateUnusable, match=r"certificate.pem is damaged"):
        new_request("alice", "f").complete(b"", server="h:1", ca_pem=authority.ca_pem, now_s=NOW_S)


def test_a_certificate_without_our_name_is_noticed(identity: ClientIdentity, authority: Authority) -> None:
    # A self-signed root that names nobody passes as its own issuer; it must still not pass as a client.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alice")])
    key = ec.generate_private_key(ec.SECP256R1())
    ca = x509.load_pem_x509_certificate(authority.ca_pem)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 5)
    builder = builder.not_valid_before(ca.not_valid_before_utc).not_valid_after(ca.not_valid_after_utc)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(Unauthenticated, match="names nobody"):
        replace(identity, ca_pem=pem, certificate_pem=pem).check(NOW_S)
