"""Contents of the stages of a pipeline: blocks, parameters, and microbatches in flight."""

from __future__ import annotations

from functools import lru_cache

from shardwise.predict.published.predictor.sizes import Setup, Sizes


def layers_of_stages(sizes: Sizes, setup: Setup) -> list[float]:
    """Blocks of each stage.

    Megatron-LM gives every stage as many; where they do not divide evenly, embedding and output count as blocks. Others
    (`Stack.balanced`) end a stage with the block whose cost reaches the stage's share, blocks counted by the
    parameters of their matrices with as many heads of keys as of queries, the output by its own (nanotron,
    `build_model` and `get_block_compute_costs`).
    """
    layers, stages = sizes.layers, setup.pipeline
    if setup.stack.balanced and stages > 1:
        each = sizes.hidden * (4 * sizes.hidden + sizes.up + sizes.ffn)
        total = layers * each + sizes.vocab * sizes.hidden
        ends = [min(layers, -(-total * (stage + 1) // (stages * each))) for stage in range(stages)]
        return [float(end - start) for start, end in zip([0, *ends[:-1]], [*ends[:-1], layers], strict=True)]
    if layers % stages == 0:
        return [layers / stages] * stages
    if (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return [each - (1 if stage in (0, stages - 1) else 0) for stage in range(stages)]
    return [layers // stages + (1 if stage < layers % stages else 0) for stage in range(stages)]


@lru_cache(maxsize=4096)
def parameters_of_stages(sizes: Sizes, setup: Setup) -> tuple[float, ...]:
    """Parameters that one rank of each stage holds; a tied output has a copy of the embedding on the last one."""
    held = [count * sizes.layer_parameters for count in layers_of_stages(sizes, setup)]
    held[0] += sizes.embedding_parameters
    held[-1] += sizes.head_parameters if len(held) == 1 else sizes.vocab * sizes.hidden
    held[-1] += sizes.hidden
    return tuple(parameters / setup.tensor for parameters in held)


def under_way(setup: Setup, stage: int) -> float:
    """Microbatches of whole stages whose activations a rank keeps when these are most.

    1F1B keeps as many as there are stages from this one on (Narayanan et al. 2019, PipeDream-Flush). Interleaved, a
    rank runs `2 (p - k - 1) + (v - 1) p` chunks ahead and one more (Korthikanti et al. 2022, section 4.2.3).
    """
    if setup.schedule == "gpipe":
        return float(setup.microbatches)
    left = setup.pipeline - stage
    if setup.chunks == 1:
        return float(min(left, setup.microbatches))
    ahead = 2 * (left - 1) + (setup.chunks - 1) * setup.pipeline + 1
    return min(ahead, setup.microbatches * setup.chunks) / setup.chunks
