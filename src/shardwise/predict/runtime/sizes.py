"""Sizes of a transformer, and how one rank computes a microbatch of it."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.predict.hardware.gpu import ELEMENT_BYTES
from shardwise.predict.runtime.runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a decoder-only (or encoder) transformer.

    Attributes:
        layers: blocks.
        hidden: width of the residual stream.
        heads: of attention.
        kv_heads: heads of keys and values (Ainslie et al. 2023).
        ffn: width of the MLP.
        vocab: rows of the embedding.
        sequence: tokens of one sample.
        gated: whether the MLP has a gate: three matrices instead of two (Shazeer 2020).
        tied: whether embedding and output share their matrix.
        learned_positions: whether positions have an embedding of their own.
        biases: whether linear layers have biases.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    sequence: int
    gated: bool
    tied: bool
    learned_positions: bool = False
    biases: bool = False

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def qkv(self) -> int:
        """Columns of the product that makes queries, keys and values."""
        return self.hidden + 2 * self.kv_heads * self.head_size

    @property
    def up(self) -> int:
        """Columns of the first product of the MLP, the gate's included."""
        return self.ffn * (2 if self.gated else 1)

    def linears(self, tensor: int = 1) -> list[tuple[int, int]]:
        """(inputs, outputs) on one of `tensor` ranks of a block's linear layers where each is a layer of its own.

        Queries, keys, values, projection, the first one of the MLP and its gate, the last one.
        """
        h, keys, wide = self.hidden, self.kv_heads * self.head_size // tensor, self.ffn // tensor
        own = h // tensor
        return [(h, own), (h, keys), (h, keys), (own, h), *[(h, wide)] * (1 + self.gated), (wide, h)]

    @property
    def layer_matrices(self) -> int:
        """Parameters of the matrices of one block."""
        return self.hidden * (self.qkv + self.hidden + self.up + self.ffn)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one block."""
        small = 4 * self.hidden if self.biases else 2 * self.hidden
        small += self.qkv + self.hidden + self.up + self.hidden if self.biases else 0
        return self.layer_matrices + small

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embeddings."""
        return self.hidden * (self.vocab + (self.sequence if self.learned_positions else 0))

    @property
    def head_parameters(self) -> int:
        """Parameters of the output beyond those that it shares with the embedding."""
        return 0 if self.tied else self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.head_parameters + self.hidden

    def forward_flops(self, samples: int) -> float:
        """FLOPs of a forward pass; attention in full, as the field counts (Narayanan et al. 2021, appendix)."""
        tokens = samples * self.sequence
        matrices = 2 * tokens * (self.layers * self.layer_matrices + self.hidden * self.vocab)
        return matrices + 4 * tokens * self.layers * self.sequence * self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """Computation of a microbatch on one rank.

    Attributes:
        tensor: degree of tensor parallelism.
        context: degree of context parallelism, which splits the sequence of each sample.
        sequence_parallel: whether what tensor parallelism replicates is split along the sequence (Korthikanti 2022).
        micro_batch: samples of a microbatch.
        recompute: `none`, `selective` (attention), `operations` (every second product), `layers` (every second block),
            `full`.
        dtype: of activations and of attention.
        linear_dtype: of the products of linear layers.
        scaling: of fp8 and fp4: empty, `delayed`, `current` or `block`.
        runtime: the software.
    """

    tensor: int
    context: int
    sequence_parallel: bool
    micro_batch: int
    recompute: str
    dtype: str
    linear_dtype: str
    scaling: str
    runtime: Runtime

    @property
    def width(self) -> int:
        """Return the bytes of one element of an activation."""
        return int(ELEMENT_BYTES[self.dtype])

    def tokens(self, sizes: Sizes) -> int:
        """Return the tokens of a microbatch on one rank of context parallelism."""
        return self.micro_batch * sizes.sequence // self.context

    def columns(self, vocab: int) -> int:
        """Rows of the embedding that a tensor-parallel rank has: Megatron-LM pads the vocabulary to 128 for each."""
        each = 128 if self.runtime.padded else 1
        return each * -(-vocab // (each * self.tensor))
