"""Profiles of a workload as other software trains it, for predictions and searches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.options import dtype_of
from shardwise.predict.hardware.gpu import ELEMENT_BYTES
from shardwise.predict.profile.memo import Memo
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.runtime.known import in_precision
from shardwise.predict.runtime.profile import transformer_profile
from shardwise.predict.runtime.runtime import Runtime
from shardwise.predict.runtime.sizes import Computation
from shardwise.predict.runtime.software import Abilities, Software
from shardwise.predict.runtime.transformer import Transformer, transformer_of
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def profiles_by(abilities: Abilities, workload: Workload, *, hopper: bool) -> ProfileSource:
    """Return the source of a workload's profiles in other software on GPUs.

    Args:
        abilities: the software.
        workload: workload to train.
        hopper: whether the devices compute in fp8, so that attention kernels of Hopper are there.

    Raises:
        WorkloadError: the software has models of its own, and the workload's is none of them.
    """
    if not abilities.models:
        return ModuleProfiles(Profiles(workload, "gpu"), Software(abilities))
    transformer = transformer_of(workload, abilities)
    runtime = replace(abilities.runtime, dropout=transformer.dropout > 0)
    if runtime.attention == "fused" and not hopper:
        runtime = replace(runtime, attention="flash")
    return TransformerProfiles(workload, transformer, runtime, Software(abilities, transformer.sizes))


@dataclass(frozen=True, slots=True)
class SoftwareDegrees:
    """Degrees of tensor parallelism that software allows."""

    software: Software

    def refusal(self, degree: int) -> str | None:
        """Return the reason against a degree. Returns None if it is possible."""
        return self.software.degree_refusal(degree)


@dataclass(slots=True)
class ModuleProfiles:
    """Profiles of the user's module in software that runs it: traced kernels, the software's bytes and overlap.

    Attributes:
        traced: traced profiles.
        software: the software.
    """

    traced: Profiles
    software: Software
    _known: dict[int, tuple[Profile, Profile]] = field(default_factory=dict)

    @property
    def workload(self) -> Workload:
        """Return the workload."""
        return self.traced.workload

    def of(self, strategy: Strategy, batch_size: int = 0) -> Profile:
        """Return the profile that a strategy is predicted from; see `Profiles.of`."""
        plain = self.traced.of(strategy, batch_size)
        if id(plain) not in self._known:
            self._known[id(plain)] = plain, _run_by(plain, self.software.abilities.runtime)
        return self._known[id(plain)][1]

    def tensor_degrees(self) -> SoftwareDegrees:
        """Return the degrees of tensor parallelism that the software allows: 1 alone."""
        return SoftwareDegrees(self.software)


def _run_by(profile: Profile, runtime: Runtime) -> Profile:
    """Return a traced profile as other software runs its module, with the software's buffers beside temporary bytes."""
    dtype = dtype_of(profile.precision)
    buffers = int(runtime.buffers * ELEMENT_BYTES[dtype])
    found = replace(profile, runtime=in_precision(runtime, dtype, pure=runtime.own_gradients), memo=Memo())
    if not buffers:
        return found
    layers = {id(segment.layer): segment.layer for segment in profile.segments}
    larger = {
        key: replace(layer, temporary_backward=layer.temporary_backward + buffers) for key, layer in layers.items()
    }
    return replace(found, segments=tuple(replace(each, layer=larger[id(each.layer)]) for each in profile.segments))


@dataclass(slots=True)
class TransformerProfiles:
    """Profiles of a transformer in software that has a model of its own.

    Attributes:
        workload: the workload.
        transformer: its model.
        runtime: behaviour of the software on the devices.
        software: the software.
    """

    workload: Workload
    transformer: Transformer
    runtime: Runtime
    software: Software
    _known: dict[tuple[Any, ...], Profile] = field(default_factory=dict)

    def of(self, strategy: Strategy, batch_size: int = 0) -> Profile:
        """Return the profile that a strategy is predicted from; see `Profiles.of`."""
        size = batch_size or self.workload.batch_size
        strategy = strategy.for_batch(size)
        samples = size // strategy.replicas // strategy.microbatches
        key = strategy.tp, strategy.sp, samples, strategy.precision_of(self.workload.precision), size
        if key not in self._known:
            found = transformer_profile(self.transformer.sizes, self._computation(*key[:4]), size)
            self._known[key] = replace(found, name=self.workload.name, clipped=self.workload.clip_norm is not None)
        return self._known[key]

    def _computation(self, tp: int, sp: int, samples: int, dtype: str) -> Computation:
        runtime = in_precision(self.runtime, dtype)
        return Computation(
            tensor=tp,
            context=1,
            sequence_parallel=bool(sp),
            micro_batch=samples,
            recompute="none",
            dtype=dtype,
            linear_dtype=dtype,
            scaling="",
            runtime=replace(runtime, overlap_tensor=runtime.overlap_tensor and bool(sp)),  # --tp-comm-overlap needs sp
        )

    def tensor_degrees(self) -> SoftwareDegrees:
        """Return the degrees of tensor parallelism that divide the model's sizes."""
        return SoftwareDegrees(self.software)
