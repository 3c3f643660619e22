"""Count the collectives and messages that every pipeline worker issues in one step.

The dry run counts them by running the program; both must agree to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from shardwise.collective import Collective
from shardwise.predict.workers.passes import turns
from shardwise.predict.workers.step_program import StepProgram

Key = tuple[str, str, str]
"""Key of a count: (operation, axis, when), as in `collective.Collective`."""


def communicated(program: StepProgram, pipeline_rank: int = 0) -> dict[Key, tuple[int, int]]:
    """Count the collectives of pipeline worker `pipeline_rank` in one step, as `by_key` does."""
    worker = program.parts.workers[pipeline_rank]
    stages = {stage.number: stage for stage in worker.stages}
    found = Counter((*program.start(worker), *program.after_passes(worker)))
    for turn in turns(program.strategy, pipeline_rank):
        for collective in program.of_pass(stages[turn.action.stage], turn):
            found[collective] += turn.count
    return by_key(found)


def by_key(counts: Mapping[Collective, int]) -> dict[Key, tuple[int, int]]:
    """Add up collectives with their counts: (operation, axis, when) -> (number, bytes)."""
    found: dict[Key, tuple[int, int]] = {}
    for each, count in counts.items():
        key = each.operation, each.axis, each.when
        number, size = found.get(key, (0, 0))
        found[key] = number + count, size + count * each.bytes
    return found
