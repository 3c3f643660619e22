"""Text for the terminal: summaries and tables of the documents that `--json` prints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.units import format_bytes, format_rate, format_seconds, format_share

UNKNOWN = "-"


def trained_by(document: Mapping[str, Any]) -> str:
    """Say which software's program is predicted."""
    runtime = document.get("runtime", "shardwise")
    return ", by Shardwise's own program" if runtime == "shardwise" else f", trained by {runtime}"


def launch_rows(document: Mapping[str, Any]) -> list[str]:
    """Format the command and the files that run a strategy in other software than Shardwise; empty without them."""
    launch = document.get("launch")
    if launch is None or launch["runtime"] == "shardwise":
        return []
    given = [f"{name}={value}" for name, value in launch["environment"].items()]
    lines = [
        "",
        f"Predicted is {launch['title']}'s program, not Shardwise's. It runs this strategy with:",
        "",
        shlex.join([*given, *launch["arguments"]]),
    ]
    for name, text in launch["files"].items():
        lines += ["", f"{name}:", "", *(f"    {line}".rstrip() for line in text.splitlines())]
    return [*lines, "", *(f"note: {note}" for note in launch["notes"])]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format aligned columns: the first one to the left, the others, which are numbers, to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def training_summary(document: Mapping[str, Any]) -> str:
    """Summarize how a training ended in a few lines."""
    workers = f"{document['workers']} worker" + ("s" if document["workers"] != 1 else "")
    alpha, exposed = document["alpha"], document["exposed_alpha"]
    lines = [
        ("loss", _number(document["loss"])),
        *(
            (name if name != "loss" else "held-out loss", _metric(name, value))
            for name, value in document["metrics"].items()
        ),
        *([("best", told)] if (told := _best(document)) else []),
        ("speed", f"{_rate(document['samples_per_second'])}, {_seconds(document['step_seconds'])} per step"),
        ("memory", f"{_bytes(document['memory_bytes'])} per worker"),
        ("predicted", _predicted(document)),
        (
            "communication",
            f"{_share(document['communication_share'])} of a step, alpha {_number(alpha)}, exposed {_number(exposed)}",
        ),
        *([("not finite", told)] if (told := _not_finite(document)) else []),
        *([("run", document["run"])] if document["run"] else []),
    ]
    width = max(len(name) for name, _ in lines)
    title = f"{document['workload']} under {document['strategy']}: {document['steps']} steps on {workers}"
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])


def _best(document: Mapping[str, Any]) -> str:
    """Say which earlier checkpoint was the best, with its values; empty if it is the last step's."""
    step = document.get("best_step")
    if step is None or step == document["steps"]:
        return ""
    return f"step {step}: " + ", ".join(f"{name} {_metric(name, v)}" for name, v in document["best_metrics"].items())


def _not_finite(document: Mapping[str, Any]) -> str:
    """Say at which step loss or gradient were first not finite, and how many updates were skipped; empty if never."""
    skipped, first = document["skipped_steps"], document["first_not_finite_step"]
    words = [f"first at step {first}"] if first else []
    words += [f"{skipped} update{'s' if skipped != 1 else ''} skipped"] if skipped else []
    return ", ".join(words)


def _predicted(document: Mapping[str, Any]) -> str:
    """Format the predicted step time and memory with their errors, or the reason for no prediction."""
    if document["predicted_seconds"] is None:
        return f"nothing: {document['reasons']['predicted_seconds']}"
    seconds, memory = document["predicted_seconds"], document["predicted_memory_bytes"]
    return (
        f"{_seconds(seconds)} per step ({_off(document['error'])}), "
        f"{_bytes(memory)} per worker ({_off(document['memory_error'])})"
    )


def _off(error: float | None) -> str:
    return UNKNOWN if error is None else f"{error:+.0%}"


def verification_table(document: Mapping[str, Any]) -> str:
    """Format a table with one row per strategy, the failures, and notes, for example on what is not sharded."""
    header = [
        "strategy",
        "workers",
        "loss error",
        "gradient error",
        "parameter error",
        "tolerance",
        "tp shards",
        "same",
    ]
    rows = [
        [
            row["strategy"],
            str(row["workers"]),
            *(_error(row[f"{kind}_error"]) for kind in ("loss", "gradient", "parameter")),
            _error(row["tolerance"]),
            format_share(row["sharded_parameter_share"]),
            "yes" if row["passed"] else "NO",
        ]
        for row in document["results"]
    ]
    steps = document["results"][0]["steps"]
    lines = [
        f"{document['workload']} in {document['dtype']}, {steps} steps: the largest relative error over all tensors",
        table(header, rows),
        *(f"{row['strategy']}: {row['failure']}" for row in document["results"] if row["failure"]),
        *(f"{row['strategy']}: note: {note}" for row in document["results"] for note in row["notes"]),
    ]
    return "\n".join(lines)


def _error(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1e}"


def comparison_table(document: Mapping[str, Any]) -> str:
    """Format a table with one row per strategy and plain loop, and notes that explain its columns."""
    shown = [*document["results"], *document["by_hand"]]
    metrics = list(dict.fromkeys(name for row in document["results"] for name in row["metrics"] if name != "loss"))
    pace = document["pace"]
    header = ["strategy", "workers", "loss", *metrics, "samples/s", "step", "spread", "predicted"]
    header += [*([] if pace is None else ["at pace"]), "memory/worker", "predicted", "communication", "speed"]
    header += ["loss difference"]
    rows = [
        [
            row["strategy"],
            str(row["workers"]),
            "failed" if row["failed"] else _number(row["loss"]),
            *(_metric(name, row["metrics"].get(name)) for name in metrics),
            UNKNOWN if row["samples_per_second"] is None else format_rate(row["samples_per_second"]),
            _seconds(row["measured_seconds"]),
            _spread(row),
            _off(row["error"]),
            *([] if pace is None else [_off(row["error_at_pace"])]),
            _bytes(row["measured_memory_bytes"]),
            _off(row["memory_error"]),
            _share(row["communication_share"]),
            UNKNOWN if row["speedup"] is None else f"{row['speedup']:.2f}x",
            UNKNOWN if row["loss_difference"] is None else f"{row['loss_difference']:.1e}",
        ]
        for row in shown
    ]
    threads = f"{document['threads']} thread" + ("s" if document["threads"] != 1 else "")
    notes = [
        *(["Interrupted: what was measured until then."] if document["interrupted"] else []),
        f"Each worker computes with {threads}.",
        _turns(document),
        *_predictions(document),
        *_equal(document),
        *_beside(document),
        "communication: share of a step spent on nothing else, waiting for others included.",
        "speed: samples/s over one worker's.",
        "loss difference: the largest relative one to one worker's loss in the first 20 steps.",
        *(f"{row['strategy']} failed after {row['steps']} steps: {row['failed']}" for row in shown if row["failed"]),
        *(f"{entry['strategy']} cannot be: {entry['reason']}" for entry in document["rejected"]),
        *(
            f"{row['strategy']}: loss or gradient are not finite from step {row['first_not_finite_step']} on"
            for row in document["results"]
            if row["first_not_finite_step"]
        ),
    ]
    return "\n".join([table(header, rows), "", *notes])


def _spread(row: Mapping[str, Any]) -> str:
    """Format half the range between the quartiles as a share of the step time: '±3%'."""
    if row["spread_seconds"] is None:
        return UNKNOWN
    return f"±{row['spread_seconds'] / 2 / row['measured_seconds']:.0%}"


def _turns(document: Mapping[str, Any]) -> str:
    """Say how the trainings took turns."""
    groups, size = document["groups"], document["slice_steps"]
    step = "step: the median over slices of"
    if len(groups) <= 1:
        return f"{step} {size} steps, which the trainings took in turns; spread: half of the slices are as near to it."
    apart = "; then ".join(", ".join(group) for group in groups)
    return f"{step} {size} steps. Not all trainings took turns, for they would not fit at once: {apart}."


def _equal(document: Mapping[str, Any]) -> list[str]:
    """Say which strategies are as fast as the fastest, as far as the spread tells."""
    others = [name for name in document["equal"] or () if name != document["fastest"]]
    if not others:
        return []
    named, verb = " and ".join(filter(None, ("; ".join(others[:-1]), others[-1]))), "are" if others[1:] else "is"
    return [f"{named} {verb} as fast as {document['fastest']} within the spread."]


def _beside(document: Mapping[str, Any]) -> list[str]:
    """Say what each strategy takes over the same by hand."""
    return [
        f"{row['beside']} takes {row['overhead']:+.1%} over {row['strategy'].partition(',')[0]}."
        for row in document["by_hand"]
        if row["overhead"] is not None
    ]


def _predictions(document: Mapping[str, Any]) -> list[str]:
    """Explain the columns of predictions, and how well the predictions chose the fastest strategy."""
    reason = document["reasons"].get("predicted_seconds")
    lines = [f"not predicted: {reason}"] if reason else []
    if document["chosen"] is None:
        return lines
    if document.get("auto") is not None:
        lines = [f"{document['auto']} is what train chooses where no strategy is given.", *lines]
    within = document["chosen"] in (document["equal"] or ())
    regret = (
        ", and nothing was faster beyond the spread" if within and document["regret"] else _regret(document["regret"])
    )
    pace = document["pace"]
    return [
        "predicted: by how much the prediction made before the run is above (+) or below (-) what was measured.",
        *([] if pace is None else [_pace(pace)]),
        f"{document['chosen']} was predicted to be the fastest{regret}.",
        *lines,
    ]


def _pace(pace: float) -> str:
    """Say how fast the machine was, compared with the time when it was measured."""
    return (
        f"at pace: the same for predictions times {pace:.2f}; a reference training, which took its turns too, took so "
        "many times as long as while this machine was measured."
    )


def _regret(regret: float | None) -> str:
    """Say how the strategy that was predicted to be the fastest compares with the fastest."""
    if regret is None:
        return ""
    if regret == 0:
        return ", and it was"
    near = regret < 0.005
    return ", and it was within 1% of the fastest" if near else f", and it was {regret:.0%} slower than the fastest"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4g}"


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{format_rate(value)} samples/s"


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else format_seconds(value)


def _bytes(value: float | None) -> str:
    return UNKNOWN if value is None else format_bytes(value)


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else format_share(value)
