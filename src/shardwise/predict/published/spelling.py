"""What the columns of a table of runs mean: precisions, recomputation, sharding, networks in many spellings."""

from __future__ import annotations

import re


def precision(text: str) -> tuple[str, str, str] | None:
    """Dtype of activations, dtype of linear layers, scaling of fp8 or fp4; None where the text names none."""
    words = text.lower()
    if "fp4" in words:
        return "bf16", "fp4", "block"
    if "fp8" in words or "float8" in words or "mxfp8" in words:
        return "bf16", "fp8", _scaling(words)
    for dtype in ("bf16", "bfloat16", "fp16", "float16"):
        if dtype in words and "fp32 or" not in words:
            return ("bf16", "bf16", "") if dtype.startswith("b") else ("fp16", "fp16", "")
    if "tf32" in words or "fp32" in words or "float32" in words:
        return "tf32", "tf32", ""
    return None


def _scaling(words: str) -> str:
    if "mx" in words or "sub-channel" in words or "block" in words:
        return "block"
    if "cs" in words or "current" in words or "tensor" in words:
        return "current"
    return "delayed"


def recompute(text: str) -> str:
    """One of the values of `Setup.recompute`."""
    words = text.lower()
    if "selective op" in words:
        return "operations"
    if "selective layer" in words:
        return "layers"
    if "selective" in words:
        return "selective"
    if words.startswith("full") or "every layer" in words or "use_checkpoint true" in words:
        return "full"
    return "none"


def zero(text: str) -> int:
    """Stage of sharding, 0 to 3."""
    words = text.lower()
    if "fsdp" in words or "full_shard" in words:
        return 3
    found = re.search(r"zero[- ]?(?:stage[- ]?)?([0-3])", words)
    if found:
        return int(found.group(1))
    return 1 if "distributed optimizer" in words else 0


def shards(text: str) -> int | None:
    """Ranks that share parameters where the text says so ("over 64", "HSDP 8")."""
    found = re.search(r"(?:over|hsdp)\s*(\d+)", text.lower())
    return int(found.group(1)) if found else None


def node_bandwidth(text: str) -> float | None:
    """Bytes per second of one node's network in one direction, where the text states it.

    "8x200Gb HDR IB per node", "800 Gbps per node", "4x Omni-Path 100Gb per node", "EFA 3200 Gbps", "RoCE 1600
    Gbps/node", "RDMA 400Gb/s per GPU" (negative: per GPU).
    """
    words = text.lower().replace(",", "")
    words = re.sub(r"busbw\s*[\d.]+\s*gbps", "", words)
    per_gpu = re.search(r"(\d+)\s*gb(?:ps|/s|it/s)?\s*(?:per|/)\s*gpu", words)
    if per_gpu:
        return -float(per_gpu.group(1)) * 1e9 / 8
    many = re.search(r"(\d+)\s*x\s*(?:[a-z -]*?)(\d+)\s*gb", words)
    if many:
        return int(many.group(1)) * int(many.group(2)) * 1e9 / 8
    for found in re.finditer(r"(\d+(?:\.\d+)?)\s*gb(?:ps|/s|it/s)?", words):
        if "nvlink" in words[: found.start()][-12:] or "busbw" in words[: found.start()][-12:]:
            continue
        return float(found.group(1)) * 1e9 / 8
    return None


def nvlink_domain(text: str) -> int | None:
    """Devices that one domain of NVLink joins, where the text says so ("NVL72")."""
    found = re.search(r"nvl(\d+)", text.lower())
    return int(found.group(1)) if found else None
