"""Five set-ups that many projects train with, under seven strategies: equality with one process, and cost of the proof.

    python -m benchmarks.setups [--steps N] [--setup NAME ...] [--strategy SPEC ...]

`error` is the largest relative error of any loss, gradient or updated parameter after some steps in float64, as
`shardwise verify` finds it. `proof_seconds` is the proof of a first step in float32, and `share_of_run` its share of a
run of 100 steps. A strategy that is refused has the reason in its row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.harness import environment, record
from benchmarks.proof import RUN, STRATEGIES, measure
from shardwise.api import verify
from shardwise.errors import RequestError
from shardwise.launch.local import run_local
from shardwise.strategy import Strategy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from shardwise import Workload


def digits(model: Callable[[], nn.Module], **changes: Any) -> Workload:
    """Classify handwritten digits with a model."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits
    from torch.utils.data import TensorDataset

    from shardwise import Evaluation, Workload

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    usual = Workload(
        name="digits",
        model=model,
        dataset=TensorDataset(images[:1500], labels[:1500]),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        batch_size=60,
        clip_norm=1.0,
        evaluation=Evaluation(
            dataset=TensorDataset(images[1500:], labels[1500:]),
            metric="accuracy",
            measure=lambda output, batch: (output.argmax(-1) == batch[1]).float().mean(),
        ),
    )
    return replace(usual, **changes)


def residual(around: Callable[[nn.Module, torch.Tensor], torch.Tensor], dropout: float = 0.0) -> nn.Module:
    """Build four residual blocks of 128 features; `around` computes one block's part of the sum."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(128), nn.Linear(128, 512), nn.Linear(512, 128)
            self.dropout = nn.Dropout(dropout)

        def inner(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.down(self.dropout(torch.nn.functional.gelu(self.up(self.norm(x)))))
            return output

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + around(self, x)

    return nn.Sequential(nn.Linear(64, 128), *(Block() for _ in range(4)), nn.Linear(128, 10))


def straight_through() -> Workload:
    """Round activations, with a gradient as if they were not rounded: an autograd function of one's own."""
    import torch

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return (x * 8).round() / 8

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    return digits(lambda: residual(lambda block, x: block.inner(Rounded.apply(x))))  # type: ignore[operator, no-untyped-call]


def muon() -> Workload:
    """Muon for matrices and AdamW for the rest, with a schedule."""
    import torch

    def both(parameters: Any) -> list[torch.optim.Optimizer]:
        every = list(parameters)
        return [
            torch.optim.Muon([p for p in every if p.dim() == 2], lr=0.02),
            torch.optim.AdamW([p for p in every if p.dim() != 2], lr=3e-3),
        ]

    return digits(
        lambda: residual(lambda block, x: block.inner(x)),  # type: ignore[operator]
        optimizer=both,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100),
    )


def two_passes() -> Workload:
    """R-drop: a step of one's own with two passes, whose dropout masks differ, and two losses by name."""
    import torch.nn.functional as F

    def step(model: Any, batch: Any) -> dict[str, Any]:
        one, two = model(batch[0]), model(batch[0])
        return {
            "classes": (F.cross_entropy(one, batch[1]) + F.cross_entropy(two, batch[1])) / 2,
            "apart": F.kl_div(one.log_softmax(-1), two.log_softmax(-1), reduction="batchmean", log_target=True),
        }

    return digits(lambda: residual(lambda block, x: block.inner(x), dropout=0.1), step=step)  # type: ignore[operator]


def averaged() -> Workload:
    """Stochastic depth and noise, a moving average of the weights, and weights that are clipped after each update."""
    import torch

    def skipped(block: Any, x: torch.Tensor) -> torch.Tensor:
        if not block.training:
            output: torch.Tensor = block.inner(x)
            return output
        kept = torch.rand((len(x), 1), dtype=x.dtype, device=x.device) < 0.8
        result: torch.Tensor = block.inner(x + 0.1 * torch.randn_like(x)) * kept / 0.8
        return result

    return digits(lambda: residual(skipped), average=0.99, after_step=lambda name, weight: weight.clamp_(-1, 1))


def contrastive() -> Workload:
    """Pull the outputs of equal digits together: a loss of the whole batch."""

    def loss(output: Any, batch: Any) -> Any:
        import torch.nn.functional as F

        near = F.normalize(output, dim=-1)
        same = (batch[1][:, None] == batch[1][None]).to(output.dtype)
        return F.binary_cross_entropy_with_logits(5 * near @ near.T, same)

    return digits(
        lambda: residual(lambda block, x: block.inner(x)),  # type: ignore[operator]
        loss=loss,
        whole_batch=True,
        evaluation=None,
    )


SETUPS = {each.__name__: each for each in (straight_through, muon, two_passes, averaged, contrastive)}


def row(setup: str, spec: str, steps: int) -> dict[str, Any]:
    """Verify one set-up under one strategy, and measure the proof of its first step."""
    found = {
        "setup": setup,
        "strategy": spec,
        "error": None,
        "proof_seconds": None,
        "share_of_run": None,
        "refused": "",
    }
    name = f"benchmarks.setups:{setup}"
    try:
        document = verify(name, [spec], steps=3, dtype="float64")
        cost = run_local(measure, (name, spec, steps), workers=Strategy.parse(spec).workers)
    except RequestError as error:
        return {**found, "refused": str(error)}
    (result,) = document["results"]
    assert result["passed"], result
    proof = cost["proof_seconds"]
    errors = max(result[f"{kind}_error"] for kind in ("loss", "gradient", "parameter"))
    return {
        **found,
        "error": errors,
        "proof_seconds": proof,
        "share_of_run": proof / (proof + RUN * cost["step_seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--setup", action="append", choices=list(SETUPS))
    parser.add_argument("--strategy", action="append")
    options = parser.parse_args()
    before = environment(threads=None)
    rows = []
    for setup in options.setup or SETUPS:
        for spec in options.strategy or STRATEGIES:
            rows.append(row(setup, spec, options.steps))
            print(rows[-1], flush=True)
    record("setups", {"steps": options.steps, "run": RUN}, rows, {}, before)


if __name__ == "__main__":
    main()
