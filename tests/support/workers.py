"""What a fake worker of a job without frozen factors need not say itself."""

from __future__ import annotations

from fedclient.trainer import Gradient, Work
from fedcore.layout import Vector


class PlainWorker:
    """Has no basis, and a base that stays as it is."""

    def basis_digest(self, work: Work) -> str:
        return ""

    def base_digest(self, work: Work) -> str | None:
        return None

    def set_basis(self, work: Work, basis: Vector) -> None:
        raise AssertionError("no job here has a basis")

    def change_base(self, work: Work, change: memoryview) -> None:
        raise AssertionError("no job here changes its base")

    def restore_base(self, work: Work) -> None:
        raise AssertionError("no job here changes its base")

    def gradient(self, work: Work, base_D: Vector, samples: int, **options: object) -> Gradient:
        raise AssertionError("no job here starts from gradients")
