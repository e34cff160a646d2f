"""The methods of this folder as aggregation rules: each makes one adapted matrix of all clients' factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

import numpy as np
from pydantic import Field

from fedagg.base import Merged, RuleTraits
from fedagg.lowrank.factors import Factors, zero_pad
from fedagg.lowrank.fedex import residual
from fedagg.lowrank.fedit import mean_of_factors
from fedagg.lowrank.flexlora import redistribute
from fedagg.lowrank.flora import stack
from fedagg.lowrank.hetlora import norm_weights, padded_mean
from fedagg.lowrank.lora_fair import refined_mean
from fedcore.changes import new_rows
from fedcore.plugin import Plugin

_TRAITS: Final = RuleTraits(shape="factors", streams=False, exact=False, needs_all=True)


class Flora(Plugin):
    """FLoRA: everything that clients have learned goes into the frozen matrix, and new factors begin.

    A is drawn anew, uniform in ±1/√n as LoRA's is, and B is 0.
    """

    name: ClassVar[str] = "flora"
    traits: ClassVar[RuleTraits] = _TRAITS
    changes_base: ClassVar[bool] = True
    unequal_ranks: ClassVar[bool] = True

    def merge(
        self, base: Factors, clients: Sequence[Factors], weights: Sequence[int], fresh: np.random.Generator
    ) -> Merged:
        """See `FactorRule.merge`."""
        a_rn = new_rows(fresh, *base.a_rn.shape)
        return Merged(Factors(np.zeros_like(base.b_mr), a_rn, base.scale), stack(clients, weights))


class FedEx(Plugin):
    """FedEx-LoRA: the mean of the factors, and what that misses goes into the frozen matrix."""

    name: ClassVar[str] = "fedex-lora"
    traits: ClassVar[RuleTraits] = _TRAITS
    changes_base: ClassVar[bool] = True
    unequal_ranks: ClassVar[bool] = False

    def merge(
        self, base: Factors, clients: Sequence[Factors], weights: Sequence[int], fresh: np.random.Generator
    ) -> Merged:
        """See `FactorRule.merge`."""
        return Merged(mean_of_factors(clients, weights), residual(clients, weights))


class FlexLora(Plugin):
    """FlexLoRA: the best factors of the job's rank for the mean of the products."""

    name: ClassVar[str] = "flexlora"
    traits: ClassVar[RuleTraits] = _TRAITS
    changes_base: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = True

    balanced: bool = Field(default=False, description="Split singular values evenly between B and A.")

    def merge(
        self, base: Factors, clients: Sequence[Factors], weights: Sequence[int], fresh: np.random.Generator
    ) -> Merged:
        """See `FactorRule.merge`. The leading ranks of the result are the best of any lower rank."""
        return Merged(redistribute(clients, weights, [(base.rank, base.scale)], balanced=self.balanced)[0])


class HetLora(Plugin):
    """HetLoRA: the mean of factors filled up with zeros, each weighing as much as its product is long.

    A client's rank stays what the job says: none prunes its own. Where all products are 0 the weights are those of the
    job. Ranks beyond that of every client stay as they were: filled up with zeros, B and A would both be 0 there, and
    never get a gradient again.
    """

    name: ClassVar[str] = "hetlora"
    traits: ClassVar[RuleTraits] = _TRAITS
    changes_base: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = True

    def merge(
        self, base: Factors, clients: Sequence[Factors], weights: Sequence[int], fresh: np.random.Generator
    ) -> Merged:
        """See `FactorRule.merge`."""
        norms = norm_weights(clients)
        mean = padded_mean(clients, norms if any(norms) else weights)
        rank, mean = mean.rank, zero_pad(mean, base.rank)
        mean.b_mr[:, rank:] = base.b_mr[:, rank:]
        mean.a_rn[rank:] = base.a_rn[rank:]
        return Merged(mean)


class LoraFair(Plugin):
    """LoRA-FAIR: the mean of the factors, with B corrected towards the mean of the products."""

    name: ClassVar[str] = "lora-fair"
    traits: ClassVar[RuleTraits] = _TRAITS
    changes_base: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = False

    penalty: float = Field(default=0.01, ge=0, le=1e6, description="Lambda: how much a correction of B costs.")

    def merge(
        self, base: Factors, clients: Sequence[Factors], weights: Sequence[int], fresh: np.random.Generator
    ) -> Merged:
        """See `FactorRule.merge`."""
        return Merged(refined_mean(clients, weights, self.penalty))
