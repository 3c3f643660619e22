"""Size of gradient buckets."""

from __future__ import annotations

BUCKET_BYTES = 25 * 2**20
"""Default bucket size in bytes, equal to DDP's: large enough for bandwidth, small enough to overlap."""


def bucket_bytes(bucket: int) -> int:
    """Convert a bucket size in MiB to bytes; 0 selects the default of 25 MiB."""
    return bucket * 2**20 or BUCKET_BYTES
