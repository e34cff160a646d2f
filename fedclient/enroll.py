"""Joining a federation: a one-time token becomes this machine's identity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from fedclient.identity import ClientIdentity, new_request, prepare_folder
from fedclient.transport.enrolment import enrol
from fedcore.clock import Clock
from fedcore.errors import ConfigError, Unauthenticated
from fedcore.identity import EnrolmentToken

MAX_TOKEN_FILE_BYTES: Final = 64 * 1024


def read_token(source: str) -> EnrolmentToken:
    """Return the token that `source` is, names, or leads to.

    Args:
        source: the token itself, ``@FILE``, or ``-`` for standard input: a token on the command line can be seen by
            every user of the machine.

    Raises:
        ConfigError: the file cannot be read.
        InvalidInput: what was found is not a token.
    """
    if source == "-":
        return EnrolmentToken.decode(sys.stdin.read(MAX_TOKEN_FILE_BYTES))
    if not source.startswith("@"):
        return EnrolmentToken.decode(source)
    path = Path(source[1:])
    try:
        with path.open(encoding="utf-8") as file:
            return EnrolmentToken.decode(file.read(MAX_TOKEN_FILE_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"token file {path} cannot be read: {reason}") from error


async def enroll(token: EnrolmentToken, folder: Path, clock: Clock, *, force: bool = False) -> ClientIdentity:
    """Make keys, have them certified, and keep them in `folder`.

    Nothing is written, and the token not spent, unless the folder can hold the identity.

    Args:
        token: from the operator.
        folder: where the identity will live.
        clock: tells whether the token has expired.
        force: replace the identity that `folder` may hold.

    Raises:
        Refused: the folder holds an identity.
        Unauthenticated: the token is expired, used or unknown.
        Unreachable: nobody answers at the token's address, or not the server that the token names.
        StorageFailed: the folder cannot be written.
    """
    if clock.wall_s() >= token.expires_at:
        raise Unauthenticated("the token has expired: ask the operator for a new one")
    prepare_folder(folder, force=force)
    request = new_request(token.client, token.federation)
    ca_pem = token.ca_pem.encode("ascii")
    certificate_pem = await enrol(
        token.enrol,
        ca_pem,
        secret=token.secret,
        certificate_request=request.csr_pem,
        signing_key=request.signing_public_key,
        signing_key_proof=request.signing_key_proof,
    )
    identity = request.complete(certificate_pem, server=token.server, ca_pem=ca_pem)
    identity.save(folder, force=force)
    identity.check(clock.wall_s())  # after saving: the token is spent, and a wrong clock can be put right
    return identity
