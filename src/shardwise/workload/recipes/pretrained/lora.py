"""Low-rank adapters (LoRA, Hu et al. 2021) in the model of a Hugging Face folder, made by the package `peft`.

    y = W x + (alpha / rank) B A x        W is frozen; A (rank, inputs) and B (outputs, rank) are trained

The new head of a classifier is trained as a whole. Adapters keep the model's class and its names, but for
`q_proj.weight`, which becomes `q_proj.base_layer.weight` beside `q_proj.lora_A.default.weight`.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.workload.recipes.packages import require
from shardwise.workload.recipes.pretrained.architecture import Architecture
from shardwise.workload.recipes.pretrained.stored import WeightOrigin
from shardwise.workload.weight_files import StoredModel, StoredWeights

BASE, DOWN, UP = ".base_layer.", ".lora_A.", ".lora_B."
ADAPTER = "default"
"""Name of the adapter in the model's names."""

ALL = "all-linear"

_TASKS = {"causal": "CAUSAL_LM", "translation": "SEQ_2_SEQ_LM", "labelled": "SEQ_CLS"}


@dataclass(frozen=True)
class Lora:
    """Adapters of a model.

    Attributes:
        rank: rank of A and B; 0 means no adapters.
        alpha: numerator of the factor of BA; None means twice the rank.
        dropout: share of the inputs of A that are dropped in training.
        targets: names of the layers that get adapters, separated by commas, or `all-linear`; None means peft's choice
            for the architecture.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | None = None

    @property
    def scaling(self) -> float:
        """Return the factor of BA."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def _config(self, architecture: Architecture, heads: Sequence[str]) -> Any:
        """Return peft's configuration of the adapters. `heads` are trained as a whole."""
        targets: Any = self.targets
        if targets not in (None, ALL):
            targets = [part.strip() for part in targets.split(",")]
        return require("peft", "peft", "lora").LoraConfig(
            r=self.rank,
            lora_alpha=self.scaling * self.rank,
            lora_dropout=self.dropout,
            target_modules=targets,
            exclude_modules=[*heads, "lm_head"] if targets == ALL else None,
            task_type=_TASKS.get(architecture.kind),
        )

    def adapted(self, model: nn.Module, architecture: Architecture) -> tuple[nn.Module, Any]:
        """Put adapters into a model, and freeze the rest but the head of a classifier.

        Returns the model, and peft's configuration with the layers that have adapters.

        Raises:
            WorkloadError: the model has no such layers, or they are not linear.
        """
        inject = require("peft", "peft", "lora").inject_adapter_in_model
        heads = heads_of(model, architecture)
        config = self._config(architecture, heads)
        try:
            with warnings.catch_warnings():  # it says that it sets what is right for transposed weights
                warnings.simplefilter("ignore")
                model = inject(config, model, adapter_name=ADAPTER)
        except (ValueError, TypeError, KeyError) as error:
            raise self._refused(architecture, " ".join(str(error).split())[:200]) from error
        other = next((n for n, p in model.named_parameters() if p.requires_grad and not _is_plain(n, p)), None)
        if other is not None:
            raise self._refused(architecture, f"{other} is not of a linear layer")
        for head in heads:
            model.get_submodule(head).requires_grad_(True)
        return model, config

    def _refused(self, architecture: Architecture, reason: str) -> WorkloadError:
        return WorkloadError(
            f"lora={self.rank}: {architecture.name} cannot get adapters: {reason}; name linear layers with "
            "lora_targets=NAME,NAME or all-linear"
        )


def lora_of(values: Mapping[str, Any]) -> Lora:
    """Return the adapters that parameters of a Hugging Face folder's workload describe; those left out are unset."""
    return Lora(
        values.get("lora", 0), values.get("lora_alpha"), values.get("lora_dropout", 0.0), values.get("lora_targets")
    )


def _is_plain(name: str, parameter: nn.Parameter) -> bool:
    return (DOWN in name or UP in name) and parameter.dim() == 2


def heads_of(model: nn.Module, architecture: Architecture) -> list[str]:
    """Return the modules of a classifier besides its base model; a language model's head is not trained anew."""
    if architecture.kind not in ("labelled", "image"):
        return []
    prefix = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    return [n for n, child in children.items() if n != prefix and next(child.parameters(), None) is not None]


def with_lora(origin: WeightOrigin, architecture: Architecture, lora: Lora) -> WeightOrigin:
    """Return the factory of the model with adapters; workers still read only their part of stored weights."""
    if not lora.rank:
        return origin
    note = f"lora: adapters of rank {lora.rank}, the other weights are frozen"
    build = partial(_adapted, _plain(origin.factory), architecture, lora)
    factory: Callable[[], nn.Module] = build
    if isinstance(origin.factory, StoredModel):
        empty = StoredModel(build, StoredWeights({}, {}))()
        factory = StoredModel(build, _AdaptedWeights.of(origin.factory.weights, empty))
    return replace(origin, factory=factory, notes=(*origin.notes, note))


def _plain(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return factory.build if isinstance(factory, StoredModel) else factory


def _adapted(build: Callable[[], nn.Module], architecture: Architecture, lora: Lora) -> nn.Module:
    return lora.adapted(build(), architecture)[0]


@dataclass(frozen=True)
class _AdaptedWeights(StoredWeights):
    """Stored weights under the names of a model with adapters; the adapters' own first values are computed.

    Attributes:
        shapes: shape of each parameter of the adapters. A starts with random values and B with zeros, as in peft.
    """

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, stored: StoredWeights, model: nn.Module) -> _AdaptedWeights:
        """Return the weights of `model`, which has adapters, from those of the plain model."""
        keys, shapes = {}, {}
        for name, tensor in model.state_dict().items():
            plain = plain_name(name)
            if plain in stored.keys:
                keys[name] = stored.keys[plain]
            elif DOWN in name or UP in name:
                shapes[name] = tuple(tensor.shape)
        return cls(stored.files, keys, shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of parameter `name`."""
        return self.shapes[name] if name in self.shapes else super().shape(name)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Read or compute the box of parameter `name` that starts at `offsets` and has `sizes`."""
        if name not in self.shapes:
            return super().read(name, offsets, sizes)
        box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        return _first_values(name, self.shapes[name])[box]


def plain_name(name: str) -> str:
    """Return the name in the plain model of a frozen parameter."""
    return name.replace(BASE, ".")


def _first_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the whole first value of a parameter of an adapter, which depends on its name alone."""
    if UP in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = shape[1] ** -0.5  # Kaiming's for a = sqrt(5), as in torch's linear layers
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
