"""The visible table of stages. A new one is one file and one line here; README.md has the wire ids."""

from __future__ import annotations

from typing import Final

from fedcodec.base import Stage
from fedcore.registry import Registry

CODECS: Final[Registry[type[Stage]]] = Registry(
    kind="codec",
    group="roundtable.codecs",
    builtins={
        "bf16": "fedcodec.quantisers.floats:Bf16",
        "clip": "fedcodec.transforms:Clip",
        "fixed-positions": "fedcodec.coders.fixed:FixedPositions",
        "fixed-symbols": "fedcodec.coders.fixed:FixedSymbols",
        "fp16": "fedcodec.quantisers.floats:Fp16",
        "gaussian-noise": "fedcodec.transforms:GaussianNoise",
        "huffman": "fedcodec.coders.huffman:Huffman",
        "int2": "fedcodec.quantisers.uniform:Int2",
        "int4": "fedcodec.quantisers.uniform:Int4",
        "int8": "fedcodec.quantisers.uniform:Int8",
        "kmeans": "fedcodec.quantisers.kmeans:KMeans",
        "kmeans-auto": "fedcodec.quantisers.kmeans:KMeansAuto",
        "per-tensor": "fedcodec.split:PerTensor",
        "rand-k": "fedcodec.selectors.rand_k:RandK",
        "ranks": "fedcodec.quantisers.ranks:Ranks",
        "raw": "fedcodec.quantisers.floats:Raw",
        "rice": "fedcodec.coders.rice:Rice",
        "rqm": "fedcodec.quantisers.rqm:Rqm",
        "sign": "fedcodec.quantisers.ternary:Sign",
        "ternary": "fedcodec.quantisers.ternary:Ternary",
        "threshold": "fedcodec.selectors.threshold:Threshold",
        "top-k": "fedcodec.selectors.top_k:TopK",
        "zstd": "fedcodec.coders.zstd:Zstd",
    },
)
