"""Parsers of free text in a table of runs: precision, recomputation, sharding, schedule and network."""

from __future__ import annotations

import re

from shardwise.predict.published.columns import MissingColumn

NO = {"no", "none", "off", "false", "0", "disabled", "not"}
"""First words of a cell that mean no."""

YES = {"yes", "on", "true", "1", "enabled", "full", "all", "uniform", "always"}
"""First words of a cell that mean yes."""

NETWORKS = (
    (r"omni-?path|\bopa\b", "omni-path-100"),
    (r"\befa\b|elastic fabric", "efa"),
    (r"slingshot", "slingshot-11"),
    (r"roce|spectrum-?x", "roce-400"),
    (r"infiniband|\bib\b|\bhdr\b|\bndr\b", "infiniband-ndr"),
    (r"tcpx", "tcpxo-200"),
    (r"ethernet|\btcp\b", "ethernet-100"),
)
"""Pattern of a network's name in texts, and the catalogue's link of that kind."""

REPLICATED = ("ddp", "dp", "allreduce", "all-reduce", "replicated", "data parallel", "3d", "not stated", "megatron")
"""Words that mean plain data parallelism: gradients are all-reduced and states are not sharded."""


def precision(text: str) -> tuple[str, str, str]:
    """Parse a precision into (dtype of activations, dtype of linear layers, scaling of fp8 or fp4).

    The scaling is empty for other dtypes.

    Raises:
        MissingColumn: the text names no known precision.
    """
    words = text.lower()
    if "fp4" in words or "float4" in words:
        return "bf16", "fp4", "block"
    if "fp8" in words or "float8" in words or "e4m3" in words:
        return "bf16", "fp8", _scaling(words)
    single = re.search(r"tf32|fp32|float32|single|32[- ]bit|^32$|^float$", words) is not None
    brain = re.search(r"bf16|bfloat16|bfloat", words) is not None
    half = re.search(r"(?<!b)fp16|(?<!b)float16|half|16[- ]bit|^16$|^o[12]$", words) is not None
    if brain:
        return "bf16", "bf16", ""
    if half and not re.search(r"(fp32|tf32|float32)\s*or\s|\sor\s*(fp32|tf32|float32)", words):
        return "fp16", "fp16", ""
    if single:
        return "tf32", "tf32", ""
    raise MissingColumn(f"precision is {text!r}; write bf16, fp16, fp32, tf32, fp8 or fp4" if text else "no precision")


def _scaling(words: str) -> str:
    if "mx" in words or "sub-channel" in words or "block" in words:
        return "block"
    if "cs" in words or "current" in words or "tensor" in words:
        return "current"
    return "delayed"


def recompute(text: str) -> str:
    """Parse recomputation into a value of `Setup.recompute`; empty text means `none`, the default of frameworks.

    Raises:
        MissingColumn: the text is unknown.
    """
    words = text.lower()
    first = (re.findall(r"[a-z0-9]+", words) or ["none"])[0]
    if re.search(r"selective[ _-]?op|selectiv\w* \(?op", words):
        return "operations"
    if re.search(r"selective[ _-]?(layer|block)|every (second|other|2nd) (layer|block)", words):
        return "layers"
    if "selective" in words or words in ("attention", "attn", "core_attn", "core attention"):
        return "selective"
    if first in NO:
        return "none"
    if first in YES or re.search(r"every layer|every block|all layers|per layer|checkpoint\w* true", words):
        return "full"
    raise MissingColumn(f"recompute is {text!r}; write none, selective, selective op, selective layer or full")


def zero(text: str) -> int:
    """Parse the ZeRO stage, 0 to 3 (Rajbhandari et al. 2020); empty text means 0.

    Raises:
        MissingColumn: the text is unknown.
    """
    words = text.lower()
    if re.search(r"shard_grad_op|grad_op", words):
        return 2
    if re.search(r"fsdp|full[ _]shard|fully sharded|hybrid[ _]shard|hsdp", words):
        return 3
    found = re.search(r"zero\W*(?:stage\W*)?([0-3])\b", words) or re.search(r"\bstage\W*([0-3])\b", words)
    if found:
        return int(found.group(1))
    if re.search(r"dist\w*[- _]opt|zero[- ]?offload", words):
        return 1
    first = (re.findall(r"[a-z0-9]+", words) or ["none"])[0]
    if words.strip() in ("1", "2", "3"):
        return int(words)
    if first in NO or any(word in words for word in REPLICATED):
        return 0
    raise MissingColumn(f"zero_fsdp is {text!r}; write none, ZeRO-1, ZeRO-2, ZeRO-3 or FSDP")


def shards(text: str) -> int | None:
    """Parse the number of ranks over which parameters are sharded ("over 64", "HSDP 8").

    Returns None if the text does not say.
    """
    found = re.search(r"(?:over|hsdp|hybrid[ _]shard)\D{0,2}([0-9]{1,9})", text.lower())
    return int(found.group(1)) if found else None


def schedule(text: str) -> str:
    """Parse a schedule into `1f1b` or `gpipe`; interleaving follows from the number of virtual stages instead.

    Raises:
        MissingColumn: the text names another schedule.
    """
    words = re.sub(r"[^a-z0-9]", "", text.lower())
    if not words or any(word in words for word in ("1f1b", "onefoneb", "interleaved", "pipedreamflush", "looped")):
        return "1f1b"
    if "gpipe" in words or "allforwardallbackward" in words or "fthenb" in words:
        return "gpipe"
    if words in NO:
        return "1f1b"
    raise MissingColumn(f"schedule is {text!r}; write 1f1b, interleaved or gpipe")


def node_bandwidth(text: str) -> float | None:
    """Parse the bandwidth of a node's network: bytes per second in one direction; negative if it is that of one GPU.

    Returns None if the text does not state it. Examples:

    "8x200Gb HDR IB per node", "800 Gbps per node", "4x Omni-Path 100Gb per node", "EFA 3200 Gbps", "RoCE 1600
    Gbps/node", "RDMA 400Gb/s per GPU" (negative).
    """
    words = text.lower().replace(",", "")
    words = re.sub(r"busbw\s*[\d.]+\s*gbps", "", words)
    per_gpu = re.search(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*gb(?:ps|/s|it/s)?\s*(?:per|/)\s*gpu", words)
    if per_gpu:
        return -float(per_gpu.group(1)) * 1e9 / 8
    many = re.search(r"([0-9]{1,9})\s*x\s*(?:[a-z -]*?)([0-9]{1,9})\s*gb", words)
    if many:
        return int(many.group(1)) * int(many.group(2)) * 1e9 / 8
    for found in re.finditer(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*gb(?:ps|/s|it/s)?", words):
        if "nvlink" in words[: found.start()][-12:] or "busbw" in words[: found.start()][-12:]:
            continue
        return float(found.group(1)) * 1e9 / 8
    return None


def network(text: str) -> str:
    """Parse the kind of a network into the name of a link in the catalogue, whose rate may differ from the text's.

    Returns an empty string if the text does not say.
    """
    words = text.lower()
    for pattern, link in NETWORKS:
        if re.search(pattern, words):
            return link
    return ""


def nvlink_links(text: str) -> int | None:
    """Parse the number of NVLink links of each device ("NVLink (4-link)"). Returns None if the text does not say."""
    found = re.search(r"nvlink\w*\s*\(?([0-9]{1,9})[- ]links?\b", text.lower())
    return int(found.group(1)) if found else None


def nvlink_domain(text: str) -> int | None:
    """Parse the number of devices in one NVLink domain ("NVL72"). Returns None if the text does not say."""
    found = re.search(r"nvl([0-9]{1,9})", text.lower())
    return int(found.group(1)) if found else None
