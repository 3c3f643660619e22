"""Sizes of a transformer and the set-up of its training: the numbers that a prediction needs."""

from __future__ import annotations

from dataclasses import dataclass


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
class Stack:
    """Behaviour of the training software: which kernels it runs and what it overlaps.

    Attributes:
        attention: `unfused` (products with a fused softmax between), `flash`, `fused` (cuDNN or flash attention 3 on
            Hopper and later).
        elementwise: `megatron` (fused bias, dropout and residual), `eager`, `compiled`, `te` (Transformer Engine).
        loss: `megatron` (vocabulary-parallel, float32 in steps), `eager` (float32 in two steps), `fused`.
        dropout: whether dropout runs.
        overlap_gradients: whether gradients are reduced during the backward pass.
        overlap_parameters: whether parameters of ZeRO-1 are gathered during the forward pass.
        overlap_tensor: whether products are cut so that the collectives of tensor parallelism hide behind their parts.
        async_tensor: whether the backward pass reduces gradients of inputs while it computes those of weights.
        overlap_pipeline: whether messages between stages hide behind computation.
        scatter_pipeline: whether a message between stages is split among the tensor-parallel ranks (Narayanan 2021).
        graphs: whether CUDA graphs spare the host from launching.
        gradient_bytes: of one element when gradients are reduced.
        accumulation_bytes: of one element of accumulated gradients.
        fused_accumulation: whether products add to the accumulated gradients themselves.
        sharded_reduction: whether ZeRO reduces to each rank only what it owns; all of them get all otherwise.
        causal: whether flash attention skips the masked half.
        bucketed: whether ZeRO-1 gathers parameters in large buckets instead of tensor by tensor.
        deepspeed: whether DeepSpeed's engine runs it, with its buckets and buffers of the pipeline.
        balanced: whether stages are cut by the cost of blocks and output instead of by number.
        padded: whether the vocabulary is padded to a multiple of 128 for each tensor-parallel rank.
        stops_early: whether recomputing a block ends with the last tensor that its backward pass needs, before the last
            product (torch.utils.checkpoint without reentry; Megatron-LM's own checkpoint repeats everything).
        fused_norms: whether a root mean square norm is one kernel; those of elementary operations are many.
        norm_inputs: whether norms keep their input for the backward pass; memory-efficient ones use their output.
    """

    attention: str
    elementwise: str
    loss: str
    dropout: bool
    overlap_gradients: bool
    overlap_parameters: bool
    overlap_tensor: bool
    overlap_pipeline: bool
    scatter_pipeline: bool
    graphs: bool
    gradient_bytes: int
    accumulation_bytes: int
    causal: bool = True
    bucketed: bool = True
    async_tensor: bool = False
    fused_accumulation: bool = False
    sharded_reduction: bool = True
    deepspeed: bool = False
    balanced: bool = False
    padded: bool = False
    stops_early: bool = False
    fused_norms: bool = True
    norm_inputs: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Split and precision of a training.

    Attributes:
        tensor, pipeline, data, context: degrees.
        sequence_parallel: whether what tensor parallelism replicates is split along the sequence (Korthikanti 2022).
        chunks: stages per pipeline rank (interleaving), 1 for none.
        schedule: `1f1b` (interleaved where `chunks` says so) or `gpipe`, which keeps all microbatches under way.
        zero: 0 replicated, 1 optimizer sharded, 2 gradients too, 3 parameters too (Rajbhandari 2020; FSDP).
        shards: ranks that share parameters under zero 3; the data-parallel ones unless hybrid.
        micro_batch: sequences per replica and microbatch.
        microbatches: per step and replica.
        recompute: `none`, `selective` (attention), `operations` (every second product), `layers` (every second block),
            `full`.
        dtype: of activations and of attention.
        linear_dtype: of the products of linear layers.
        scaling: of fp8 and fp4: ``, `delayed`, `current`, `block`.
        stack: the software.
    """

    tensor: int
    pipeline: int
    data: int
    context: int
    sequence_parallel: bool
    chunks: int
    zero: int
    shards: int
    micro_batch: int
    microbatches: int
    recompute: str
    dtype: str
    linear_dtype: str
    scaling: str
    stack: Stack
    schedule: str = "1f1b"

    def columns(self, vocab: int) -> int:
        """Rows of the embedding that a tensor-parallel rank has: Megatron-LM pads the vocabulary to 128 for each."""
        each = 128 if self.stack.padded else 1
        return each * -(-vocab // (each * self.tensor))

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters and reduce their gradients: data and context parallel ones."""
        return self.data * self.context

    @property
    def devices(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline * self.data * self.context
