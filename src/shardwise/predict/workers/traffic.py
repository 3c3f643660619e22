"""Count the collectives and messages that every pipeline worker issues in one step.

The dry run counts them by running the program; both must agree to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from shardwise.collective import Collective
from shardwise.predict.profile.profile import Profile
from shardwise.predict.workers.holdings import Parts
from shardwise.predict.workers.passes import turns
from shardwise.predict.workers.step_program import StepProgram

Key = tuple[str, str, str]
"""Key of a count: (operation, axis, when), as in `collective.Collective`."""


def communicated(profile: Profile, parts: Parts, pipeline_rank: int = 0) -> Mapping[Key, tuple[int, int]]:
    """Count the collectives of pipeline worker `pipeline_rank` in one step: (operation, axis, when) -> (number, bytes).

    Axes, phases and bytes are those of `collective.Collective`.
    """
    program, worker = StepProgram(profile, parts), parts.workers[pipeline_rank]
    stages = {stage.number: stage for stage in worker.stages}
    found = Counter((*program.start(worker), *program.after_passes(worker)))
    for turn in turns(parts.strategy, pipeline_rank):
        for collective in program.of_pass(stages[turn.action.stage], turn):
            found[collective] += turn.count
    return _by_key(found)


def _by_key(found: Mapping[Collective, int]) -> Mapping[Key, tuple[int, int]]:
    counts: dict[Key, tuple[int, int]] = {}
    for each, count in found.items():
        key = each.operation, each.axis, each.when
        number, size = counts.get(key, (0, 0))
        counts[key] = number + count, size + count * each.bytes
    return counts
