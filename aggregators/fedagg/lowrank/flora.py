"""FLoRA: clients' factors side by side.

Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedagg.lowrank.factors import Factors, combine, counted


def stack(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return Σ pₖ Pₖ as B = [p₁ s₁ B₁ … ], A = [A₁; … ], of rank R = Σ rₖ and scale 1. Exact.

    Clients add it to W0 and begin with new factors. Ranks and scales may differ.

    Raises:
        InvalidInput: see `counted`.
    """
    return combine(*counted(clients, weights))
