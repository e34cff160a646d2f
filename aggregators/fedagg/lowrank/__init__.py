"""The algebra of federated low-rank adapters, in numpy, one adapted matrix at a time. README.md is the catalogue."""

from __future__ import annotations

from typing import Final

from fedagg.lowrank.basis import Start, add_gradients, add_votes, digest, start
from fedagg.lowrank.factors import Factors, Matrix, combine, product_norm, truncate, zero_pad
from fedagg.lowrank.fed_sb import mean_of_squares
from fedagg.lowrank.fedex import residual
from fedagg.lowrank.fedit import mean_of_factors, mean_of_moving
from fedagg.lowrank.flexlora import redistribute
from fedagg.lowrank.flora import stack
from fedagg.lowrank.hetlora import norm_weights, padded_mean, pruned_rank, tail_penalty
from fedagg.lowrank.lora_fair import refined_mean
from fedagg.lowrank.svd import Svd, factored_svd, randomised_svd, recompress, truncated_svd

__all__: Final = [
    "Factors",
    "Matrix",
    "Start",
    "Svd",
    "add_gradients",
    "add_votes",
    "combine",
    "digest",
    "factored_svd",
    "mean_of_factors",
    "mean_of_moving",
    "mean_of_squares",
    "norm_weights",
    "padded_mean",
    "product_norm",
    "pruned_rank",
    "randomised_svd",
    "recompress",
    "redistribute",
    "refined_mean",
    "residual",
    "stack",
    "start",
    "tail_penalty",
    "truncate",
    "truncated_svd",
    "zero_pad",
]
