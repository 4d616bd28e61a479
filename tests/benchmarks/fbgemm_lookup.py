"""FBGEMM's way from ids to fp32 rows on a CPU: a hash from id to row number, then an INT4 table without pooling."""

import fbgemm_gpu  # noqa: F401  registers the operators
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

__all__ = ["FbgemmTable", "HashTable", "PrunedMap"]

LOAD_FACTOR = 0.5  # FBGEMM's own default, `pruning_hash_load_factor`


class FbgemmTable:
    """An INT4 inference table filled with packed rows.

    Args:
        packed: uint8 (N, D/2 + 4), scale and bias last; FBGEMM's inference tables want them first.
    """

    def __init__(self, packed: np.ndarray, *, dim: int) -> None:
        self.table = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("rows", len(packed), dim, SparseType.INT4, EmbeddingLocation.HOST)],
            pooling_mode=PoolingMode.NONE, output_dtype=SparseType.FP32, device="cpu",
        )
        self.table.initialize_weights()
        weights = self.table.split_embedding_weights(split_scale_shifts=False)[0][0]  # (N, padded)
        weights[:, :4].copy_(torch.from_numpy(packed[:, -4:]))
        weights[:, 4 : packed.shape[1]].copy_(torch.from_numpy(packed[:, :-4]))

    def rows(self, numbers: Tensor, offsets: Tensor) -> Tensor:
        """Row numbers (B,) to float32 (B, D)."""
        return self.table(numbers, offsets)


class HashTable:
    """`pruned_hashmap_lookup` over keys of 64 or 32 bits, all of them known.

    Args:
        keys: int64 or int32 (N,), distinct; key i has row i.
    """

    def __init__(self, keys: Tensor) -> None:
        slots = int(len(keys) / LOAD_FACTOR)
        self.slots = torch.full((slots, 2), -1, dtype=keys.dtype)
        self.bounds = torch.tensor([0, slots], dtype=torch.int64)
        numbers, tables = torch.arange(len(keys), dtype=keys.dtype), torch.tensor([0, len(keys)], dtype=keys.dtype)
        torch.ops.fbgemm.pruned_hashmap_insert(keys, numbers, tables, self.slots, self.bounds)

    def numbers(self, keys: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.fbgemm.pruned_hashmap_lookup(keys, offsets, self.slots, self.bounds)


class PrunedMap:
    """The class that FBGEMM's inference table itself uses on a CPU; keys of 32 bits only."""

    def __init__(self, keys: Tensor) -> None:
        self.map = torch.classes.fbgemm.PrunedMapCPU()
        numbers, tables = torch.arange(len(keys), dtype=torch.int32), torch.tensor([0, len(keys)], dtype=torch.int32)
        self.map.insert(keys, numbers, tables, 1)

    def numbers(self, keys: Tensor, offsets: Tensor) -> Tensor:
        return self.map.lookup(keys, offsets)
