"""`fedclient check` and `fedclient base`: would this client work, and if not, why not?"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedclient.basedigest import base_digest
from fedclient.daemon import ClientSettings, load_guard, load_identity, make_worker, own_policy
from fedclient.identity import ClientIdentity
from fedclient.ledger import FileLedger
from fedclient.policy import Policy
from fedcore.clock import Clock
from fedcore.errors import Exit, FedError
from fedcore.jobfile import load_job


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `exit_code` is OK, or that of what is wrong."""

    name: str
    text: str
    exit_code: Exit = Exit.OK


async def check_client(settings: ClientSettings, clock: Clock) -> list[Finding]:
    """Look at identity, device, policy and ledger, and server, in this order; the server if the identity is valid."""
    findings: list[Finding] = []
    identity: ClientIdentity | None = None
    try:
        identity = load_identity(settings, clock)
        until = datetime.fromtimestamp(identity.expires_at, UTC)
        text = f"{identity.client} in {identity.federation}, valid until {until:%Y-%m-%d %H:%M} UTC"
        findings.append(Finding("identity", text))
    except FedError as error:
        findings.append(Finding("identity", str(error), error.exit_code))
    try:
        with ThreadPoolExecutor(max_workers=1) as executor:
            worker = await asyncio.get_running_loop().run_in_executor(executor, make_worker, settings)
        findings.append(Finding("device", worker.device_description))
    except FedError as error:
        findings.append(Finding("device", str(error), error.exit_code))
    findings += _check_privacy(settings, clock)
    if identity is not None:
        findings.append(await _check_server(settings, identity, clock))
    return findings


def base_of(path: Path, settings: ClientSettings) -> str | None:
    """Return the digest of a folder's or a file's safetensors, or of what is frozen of the model for a job file.

    Raises:
        InvalidInput: there is no such thing, it is damaged, or the model cannot be built here; or for another reason of
            the task's.
    """
    if path.suffix != ".toml":
        return base_digest(path)
    from fedclient.tasks.files import load_task_file
    from fedclient.trainer import Work

    job, worker = load_job(path), make_worker(settings)
    for file in settings.task_files:
        load_task_file(file)
    return worker.base_digest(Work(path.name, job, 0, "", 0))


def _check_privacy(settings: ClientSettings, clock: Clock) -> list[Finding]:
    """Look at policy and ledger, where there is anything to look at."""
    try:
        load_guard(settings, clock)
        policy, accounts = own_policy(settings), FileLedger(settings.folder).read()
    except FedError as error:
        return [Finding("privacy", str(error), error.exit_code)]
    if policy == Policy() and not accounts.jobs:
        return []
    rules = "no policy" if policy == Policy() else f"policy for {'all' if policy.privacy is None else 'private'} jobs"
    return [Finding("privacy", f"{rules}; ledger of {accounts.in_all().updates} updates in {len(accounts.jobs)} jobs")]


async def _check_server(settings: ClientSettings, identity: ClientIdentity, clock: Clock) -> Finding:
    from fedclient.transport.grpc_transport import GrpcTransport

    transport = GrpcTransport(identity, clock, settings.server)
    address = settings.server or identity.server
    try:
        # Any call proves both sides' certificates. Not a session: that would take a running client's place.
        await transport.upload_state("0" * 32)
    except FedError as error:
        return Finding("server", f"{address}: {error}", error.exit_code)
    finally:
        await transport.close()
    return Finding("server", f"{address} answers and knows this client")
