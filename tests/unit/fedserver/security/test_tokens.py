from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.errors import InvalidInput, Unauthenticated
from fedcore.identity import EnrolmentToken
from fedserver.security.tokens import MAX_LIFETIME_S, issue, redeem, secret_sha256


@dataclass(frozen=True)
class Record:
    client: str = "alice"
    expires_at: float = 200.0
    used_at: float | None = None


def _ca_pem() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(x509.Name([]), x509.Name([]), key.public_key(), 1)
    builder = builder.not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
    certificate = builder.not_valid_after(datetime(2027, 1, 1, tzinfo=UTC)).sign(key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


CA_PEM = _ca_pem()


def issued(client: str = "alice", lifetime_s: float = 60.0) -> tuple[EnrolmentToken, str]:
    return issue(client, lifetime_s, 1000.0, server="h:1", enrol="h:2", federation="f", ca_pem=CA_PEM)


def test_an_issued_token_says_where_who_and_until_when() -> None:
    token, digest = issued()
    assert EnrolmentToken.decode(token.encode()) == token
    assert (token.server, token.enrol, token.federation, token.client, token.ca_pem) == (
        "h:1",
        "h:2",
        "f",
        "alice",
        CA_PEM,
    )
    assert token.expires_at == 1060.0
    assert digest == secret_sha256(token.secret) == hashlib.sha256(token.secret.encode()).hexdigest()


def test_no_two_tokens_share_a_secret() -> None:
    assert len({issued()[1] for _ in range(100)}) == 100


@pytest.mark.parametrize("lifetime_s", [0.0, -1.0, MAX_LIFETIME_S + 1, float("nan"), float("inf")])
def test_a_lifetime_out_of_bounds_is_refused(lifetime_s: float) -> None:
    with pytest.raises(InvalidInput, match="lifetime"):
        issued(lifetime_s=lifetime_s)


def test_a_token_for_no_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match="client 'a b'"):
        issued(client="a b")


def test_a_token_is_redeemed_until_it_expires() -> None:
    assert redeem(Record(), 0.0) == "alice"
    assert redeem(Record(), 199.999) == "alice"
    with pytest.raises(Unauthenticated, match="expired at 1970-01-01 00:03:20 UTC; ask for a new one"):
        redeem(Record(), 200.0)


def test_a_token_works_once() -> None:
    with pytest.raises(Unauthenticated, match="'alice' was already used at 1970-01-01 00:01:40 UTC"):
        redeem(Record(used_at=100.0), 150.0)
    with pytest.raises(Unauthenticated, match="already used"):
        redeem(Record(used_at=0.0), 150.0)


def test_an_unknown_token_is_refused() -> None:
    with pytest.raises(Unauthenticated, match="not issued"):
        redeem(None, 0.0)


def test_any_text_of_a_hostile_caller_has_a_hash() -> None:
    assert len(secret_sha256("\ud800")) == len(secret_sha256("")) == 64
