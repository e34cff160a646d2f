"""The algebra of federated low-rank adapters, in numpy, one adapted matrix at a time. README.md is the catalogue."""

from __future__ import annotations

from typing import Final

from fedagg.lowrank.basis import Start, start
from fedagg.lowrank.factors import Factors, Matrix, combine, product_norm, zero_pad
from fedagg.lowrank.fedex import residual
from fedagg.lowrank.fedit import mean_of_factors
from fedagg.lowrank.flexlora import redistribute
from fedagg.lowrank.flora import stack
from fedagg.lowrank.hetlora import norm_weights, padded_mean
from fedagg.lowrank.lora_fair import refined_mean
from fedagg.lowrank.svd import Svd, factored_svd, randomised_svd, recompress, truncated_svd

__all__: Final = [
    "Factors",
    "Matrix",
    "Start",
    "Svd",
    "combine",
    "factored_svd",
    "mean_of_factors",
    "norm_weights",
    "padded_mean",
    "product_norm",
    "randomised_svd",
    "recompress",
    "redistribute",
    "refined_mean",
    "residual",
    "stack",
    "start",
    "truncated_svd",
    "zero_pad",
]
