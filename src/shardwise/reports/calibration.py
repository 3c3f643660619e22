"""Text of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.units import format_bytes, format_seconds, format_share


def calibration_summary(document: Mapping[str, Any]) -> str:
    """Summarize the measurements of a calibration in a few lines."""
    if "samples" not in document:
        return f"the first worker writes {document['cluster']}"
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in document["flops"].items())
    lines = [
        ("matrix products", rates),
        ("memory", f"{format_bytes(document['memory_bandwidth'])}/s, {format_bytes(document['memory_bytes'])}"),
        ("host", f"{format_seconds(document['launch_seconds'])} for each kernel"),
        *(
            (f"{workers} workers", f"each computes {factor:.2f} times as long as one alone")
            for workers, factor in document["shared"].items()
        ),
        ("overlap", f"computing takes {document['overlap']:.2f} times as long while workers communicate"),
        ("training", f"kernels take {document['strain']:.2f} times as long as in calls of their own"),
        *(
            (
                level["name"],
                f"{format_bytes(level['bandwidth'])}/s, {format_seconds(level['latency_seconds'])} at least",
            )
            for level in document["levels"]
        ),
        *(
            (f"process ({kind})", f"{format_bytes(size)} beside tensors")
            for kind, size in document["process_bytes"].items()
        ),
        *(
            (f"host ({what})", f"{format_seconds(seconds)} each, beside kernels and messages")
            for what, seconds in document["overhead_seconds"].items()
        ),
        *(
            [("crowding", f"{document['crowding']:.2f} times the samples/s if workers outnumber cores")]
            if document.get("crowding")
            else []
        ),
        ("allocator", f"{document['heap']:.2f} bytes for each byte of activations"),
        ("measured", f"{document['samples']} points in {format_seconds(document['seconds'])}"),
        ("spread", f"{format_share(document['median_spread'])} between calls of one point (interquartile, median)"),
        ("others", f"{document.get('busy_cores', 0.0):.2f} cores used by other programs meanwhile"),
    ]
    width = max(len(name) for name, _ in lines)
    title = f"{document['name']}: wrote {document['cluster']}"
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])
