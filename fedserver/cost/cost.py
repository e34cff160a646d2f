"""Parameters and bytes of one round, for a method, a model's shapes, a rank and a number of clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedcodec import Pipeline
from fedcore.errors import InvalidInput
from fedcore.layout import MAX_VALUES
from fedcore.methods import Method, Sends
from fedserver.cost.shapes import Shapes


@dataclass(frozen=True)
class Traffic:
    """What one client sends, or gets, in one round.

    Attributes:
        parameters: how many numbers; of rounds that follow in turn and differ, those of the largest.
        turns: how many in each of those rounds; one unless the method alternates.
        bytes: `parameters` × bytes per value.
        all_parameters: of all clients together.
        all_bytes: of all clients together.
        max_frame_bytes: no frame of the job's pipeline is longer; None without a job, and for more values than a frame
            can hold.
        frame_bytes: every such frame has this length; None if that depends on the values, or on a client's own rank.
        change_bytes: what of `parameters` is a change of frozen matrices, which travels beside the frame as float32.
    """

    parameters: int
    turns: tuple[int, ...]
    bytes: int
    all_parameters: int
    all_bytes: int
    max_frame_bytes: int | None = None
    frame_bytes: int | None = None
    change_bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """A method's traffic; what crosses once, before the first round, stands apart.

    Attributes:
        method: its name.
        rank: None if the method has none.
        up: client to server.
        down: server to client.
        setup_up: once, from each client that takes part in the initialisation.
        setup_down: once, to each client.
        setup_vote_bytes_up: bytes instead of `setup_up` if clients send one bit for each value, its sign.
    """

    method: str
    rank: int | None
    up: Traffic
    down: Traffic
    setup_up: Traffic
    setup_down: Traffic
    setup_vote_bytes_up: int


def cost_of(
    method: Method,
    shapes: Shapes,
    rank: int,
    clients: int,
    bytes_per_value: int = 4,
    pipelines: tuple[Pipeline, Pipeline] | None = None,
    *,
    lower_ranks: bool = False,
) -> Cost:
    """Return what `method` sends.

    Args:
        method: from the table.
        shapes: what of the model is trained.
        rank: r, the same for every client and matrix; who has another pays what this function says for that, but for
            FLoRA and FedEx-LoRA, where a download has the ranks of all clients.
        clients: K, how many updates the server adds up in a round.
        bytes_per_value: of what is sent without a pipeline.
        pipelines: of a job, up and down.
        lower_ranks: whether some clients of the job have a lower rank, and send less than is counted here.

    Raises:
        InvalidInput: the rank is above min(m, n) of a matrix.
    """
    if not method.whole and rank > shapes.max_rank:
        small = next(matrix for matrix in shapes.matrices if rank > min(matrix.m, matrix.n))
        raise InvalidInput(f"rank {rank}: {small.path} is {small.m} × {small.n}, so at most {min(small.m, small.n)}")

    def sizes(sends: Sends) -> list[int]:
        sent = [item.num_values(m, n, rank, clients) for _, m, n in shapes.matrices for item in sends]
        return [size for size in sent if size]

    def sent(turns: tuple[Sends, ...]) -> list[list[int]]:
        return [list(shapes.whole) if method.whole else [*sizes(sends), *shapes.heads] for sends in turns]

    def traffic(turns: tuple[Sends, ...], frames: tuple[Sends, ...], pipeline: Pipeline | None) -> Traffic:
        found = _traffic(sent(turns), sent(frames), clients, bytes_per_value, pipeline)
        changes = max(sum(sizes(tuple(each for each in sends if each.is_change))) for sends in turns)
        return replace(found, change_bytes=4 * changes)

    def setup(sends: Sends) -> Traffic:
        return _traffic([sizes(sends)], [], clients, bytes_per_value, None)

    up, down = pipelines or (None, None)
    votes = (-(-size // 8) for size in sizes(method.setup_up))
    found = traffic(method.up, method.up, up)
    return Cost(
        method=method.name,
        rank=None if method.whole else rank,
        up=replace(found, frame_bytes=None) if lower_ranks else found,
        down=traffic(method.down, method.frames_down, down),
        setup_up=setup(method.setup_up),
        setup_down=setup(method.setup_down),
        setup_vote_bytes_up=sum(votes),
    )


def _traffic(
    turns: Sequence[Sequence[int]],
    frames: Sequence[Sequence[int]],
    clients: int,
    bytes_per_value: int,
    pipeline: Pipeline | None,
) -> Traffic:
    """Return the traffic of rounds in turn, each with the sizes of its tensors, and of those in frames."""
    parameters = max(map(sum, turns))
    framed = None
    if pipeline is not None and parameters <= MAX_VALUES:
        framed = max(pipeline.max_frame_bytes(sizes) for sizes in frames)
    return Traffic(
        parameters=parameters,
        turns=tuple(map(sum, turns)),
        bytes=parameters * bytes_per_value,
        all_parameters=parameters * clients,
        all_bytes=parameters * bytes_per_value * clients,
        max_frame_bytes=framed,
        frame_bytes=framed if pipeline is not None and pipeline.fixed_size else None,
    )
