"""Rule for losses that need the whole batch: which strategies leave it in one piece, or can join its outputs."""

from __future__ import annotations

from shardwise.errors import StrategyError, WorkloadError
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def in_one_batch(workload: Workload, strategy: Strategy) -> Strategy:
    """Return the strategy with one microbatch if the loss needs the whole batch, else the strategy unchanged.

    Raises:
        StrategyError: the strategy cuts the batch into microbatches, or cuts both the batch and the model.
        WorkloadError: the loss has trained parameters too, and several replicas would each train them.
    """
    if not workload.whole_batch:
        return strategy
    if strategy.microbatches > 1:
        raise StrategyError(f"microbatches={strategy.microbatches}: a loss of the whole batch needs microbatches=1")
    if strategy.replicas > 1 and strategy.tp * strategy.pp > 1:
        raise StrategyError(
            f"{strategy} cuts the batch and the model: a loss of the whole batch works with dp and fsdp, or on one "
            "replica with tp and pp"
        )
    parameters = getattr(workload.loss, "parameters", None)
    if strategy.replicas > 1 and parameters is not None and next(iter(parameters()), None) is not None:
        raise WorkloadError("a loss of the whole batch with trained parameters works on one replica: use tp or pp")
    return strategy.with_(microbatches=1)
