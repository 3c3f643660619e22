from __future__ import annotations

from shardwise.reports.text import comparison_table, table, training_summary

TRAINED = {
    "workload": "image",
    "strategy": "dp=2",
    "workers": 2,
    "steps": 120,
    "loss": 0.12345,
    "metrics": {"loss": 0.2, "accuracy": 0.978},
    "samples_per_second": 1234.5,
    "step_seconds": 0.0512,
    "alpha": 0.31,
    "exposed_alpha": 0.14,
    "communication_share": 0.123,
    "memory_bytes": 312 * 2**20,
    "predicted_seconds": 0.0486,
    "error": -0.05,
    "predicted_memory_bytes": 318 * 2**20,
    "memory_error": 0.02,
    "reasons": {},
    "skipped_steps": 0,
    "first_not_finite_step": None,
    "run": "runs/image-dp2-1",
}


def test_table_is_aligned() -> None:
    assert table(["name", "n"], [["a", "100"], ["longer", "2"]]).splitlines() == [
        "name      n",
        "------  ---",
        "a       100",
        "longer    2",
    ]


def test_training_summary() -> None:
    assert training_summary(TRAINED).splitlines() == [
        "image under dp=2: 120 steps on 2 workers",
        "  loss           0.1235",
        "  held-out loss  0.2",
        "  accuracy       97.80%",
        "  speed          1,234 samples/s, 51.2 ms per step",
        "  memory         312.0 MiB per worker",
        "  predicted      48.6 ms per step (-5%), 318.0 MiB per worker (+2%)",
        "  communication  12% of a step, alpha 0.31, exposed 0.14",
        "  run            runs/image-dp2-1",
    ]


def test_what_is_unknown_shows_as_a_dash() -> None:
    unknown: dict[str, object] = dict.fromkeys(
        ("loss", "samples_per_second", "step_seconds", "alpha", "exposed_alpha", "run", "predicted_seconds")
    )
    unknown["reasons"] = {"predicted_seconds": "not measured"}
    text = training_summary({**TRAINED, **unknown, "communication_share": None, "workers": 1, "metrics": {}})
    assert "predicted      nothing: not measured\n" in text
    assert "on 1 worker\n" in text
    assert "speed          -, - per step" in text
    assert "communication  - of a step, alpha -, exposed -" in text
    assert "None" not in text


def test_comparison_table() -> None:
    row = {
        "strategy": "dp=2",
        "workers": 2,
        "loss": 0.5,
        "metrics": {"loss": 0.6, "accuracy": 0.9},
        "samples_per_second": 1000.0,
        "measured_seconds": 0.064,
        "error": 0.031,
        "measured_memory_bytes": 2**30,
        "memory_error": -0.02,
        "communication_share": 0.25,
        "speedup": 1.8,
        "loss_difference": 1.2e-7,
        "first_not_finite_step": None,
        "spread_seconds": 0.0064,
        "steps": 30,
        "failed": None,
    }
    unknown = {**row, "strategy": "single", "workers": 1, "metrics": {}, "speedup": None, "loss_difference": None}
    unknown |= {"error": None, "memory_error": None, "spread_seconds": None}
    hand = {**row, "strategy": "DDP by hand, 2 workers", "beside": "dp=2", "overhead": 0.012}
    document = {"results": [unknown, row], "threads": 1, "rejected": [{"strategy": "tp=3", "reason": "16 heads"}]}
    document |= {"by_hand": [hand], "interrupted": False, "groups": [["single", "dp=2"]], "slice_steps": 5}
    document |= {"fastest": "dp=2", "equal": ["dp=2", "single"]}
    document |= {"chosen": "dp=2", "regret": 0.0, "reasons": {"predicted_seconds": "single was not measured"}}
    document |= {"pace": None}
    lines = comparison_table(document).splitlines()
    assert lines[0].split("  ")[0] == "strategy"
    assert "accuracy" in lines[0]
    single = ["single", "1", "0.5", "-", "1,000", "64.0", "ms", "-", "-", "1.0", "GiB", "-", "25%", "-", "-"]
    assert lines[2].split() == single
    assert lines[3].split() == [
        "dp=2",
        "2",
        "0.5",
        "90.00%",
        "1,000",
        "64.0",
        "ms",
        "±5%",
        "+3%",
        "1.0",
        "GiB",
        "-2%",
        "25%",
        "1.80x",
        "1.2e-07",
    ]
    assert "dp=2 was predicted to be the fastest, and it was." in lines
    assert "single is as fast as dp=2 within the spread." in lines
    assert "dp=2 takes +1.2% over DDP by hand." in lines
    document["equal"] = ["single"]
    for regret, words in (
        (0.004, "and it was within 1% of the fastest"),
        (0.25, "and it was 25% slower than the fastest"),
    ):
        assert f"dp=2 was predicted to be the fastest, {words}." in comparison_table({**document, "regret": regret})
    assert "not predicted: single was not measured" in lines
    at_pace = [{**each, "error_at_pace": error} for each, error in ((unknown, None), (row, 0.25))]
    paced = comparison_table({**document, "results": at_pace, "by_hand": [], "pace": 1.21})
    assert "predicted  at pace  memory" in paced
    assert "+3%     +25%" in paced
    assert "predictions times 1.21" in paced
    nothing = {**document, "chosen": None, "regret": None}
    assert "predicted to be" not in comparison_table(nothing)
    assert lines[-1] == "tp=3 cannot be: 16 heads"
    failing = {**document, "results": [unknown, {**row, "failed": "worker 1 was killed"}], "interrupted": True}
    lines = comparison_table(failing | {"groups": [["single"], ["dp=2"]]}).splitlines()
    assert lines[3].split()[2] == "failed"
    assert "dp=2 failed after 30 steps: worker 1 was killed" in lines
    assert "Interrupted: what was measured until then." in lines
    assert any(line.endswith("they would not fit at once: single; then dp=2.") for line in lines)


def test_training_summary_names_an_earlier_best() -> None:
    best = {"best_step": 4, "best_metrics": {"loss": 0.25, "accuracy": 0.5}}
    told = [line for line in training_summary({**TRAINED, **best}).splitlines() if line.startswith("  best")]
    assert [line.split(maxsplit=1)[1] for line in told] == ["step 4: loss 0.25, accuracy 50.00%"]
    assert "  best" not in training_summary({**TRAINED, **best, "best_step": TRAINED["steps"]})
