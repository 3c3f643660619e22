"""Text with hidden tokens, for a masked language model (Devlin et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.errors import WorkloadError
from shardwise.workload.recipes.datasets.text import Windows

HIDDEN_SHARE = 0.15
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Shares of the chosen tokens that are replaced by the mask token and by a random one; the others stay."""

IGNORED = -100
"""Target of a token that is not to be predicted: torch's cross entropy ignores it."""


class HiddenTokens(Dataset[dict[str, Tensor]]):
    """Windows of text of which 15% of the tokens have to be predicted; other ones in each epoch.

    The epoch and the sample's index alone decide which tokens, so every strategy sees the same. Samples: `tokens` and
    `targets`, int64 (sequence,); a target is `IGNORED` where nothing is to be predicted.

    Raises:
        WorkloadError: a window has too few tokens to hide one.
    """

    def __init__(self, windows: Windows, mask: int, vocabulary: int) -> None:
        self._windows, self._mask, self._vocabulary = windows, mask, vocabulary
        self._epoch = 0
        self._count = round(HIDDEN_SHARE * windows.sequence)
        if self._count < 1:
            raise WorkloadError(f"sequence={windows.sequence}: a masked language model needs 4 tokens or more")

    def set_epoch(self, epoch: int) -> None:
        """Choose other tokens, as those of `epoch`."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._windows[index]["tokens"][:-1]
        drawn = torch.Generator().manual_seed(self._epoch * 1_000_003 + index)
        places = torch.randperm(len(tokens), generator=drawn)[: self._count]
        kind = torch.rand(self._count, generator=drawn, dtype=torch.float32)  # whatever the default dtype is
        others = torch.randint(self._vocabulary, (self._count,), generator=drawn)
        targets = torch.full_like(tokens, IGNORED)
        targets[places] = tokens[places]
        others = torch.where(kind < MASKED_SHARE + RANDOM_SHARE, others, tokens[places])
        hidden = tokens.clone()
        hidden[places] = torch.where(kind < MASKED_SHARE, self._mask, others)
        return {"tokens": hidden, "targets": targets}


def hidden_tokens(batch: Any) -> Tensor:
    """Return how many tokens of a batch are to be predicted, which its loss averages over."""
    found: Tensor = (batch["targets"] != IGNORED).sum()
    return found
