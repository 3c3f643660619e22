"""Estimate the seconds that a GPU takes for one kernel, with an analytic model for any device of the catalogue.

    matmul     tiles are assigned to the SMs in waves; a partly filled last wave costs up to a full one
               seconds = waves x tile FLOPs / (rate of an SM x efficiency of the tile), at least the time of its bytes
    attention  flash attention: FLOPs of the unmasked half over a share of the rate (Dao 2023, arXiv:2307.08691)
    memory     bytes over a share of the memory's bandwidth (roofline, Williams et al. 2009)

Large matmuls do not reach the datasheet's rate, because the GPU lowers its clock to stay within its power limit:
`sustained` is the share that remains.
"""

from __future__ import annotations

from shardwise.cluster.cluster import Device
from shardwise.errors import RequestError
from shardwise.predict.hardware.constants import Constants, constants
from shardwise.predict.profile.kernel import Kernel

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (128, 64), (64, 128), (64, 64))
"""Output tiles that matmul libraries offer, as (rows, columns)."""

SPLITS = (1, 2, 4, 8)
"""Numbers of parts into which a matmul may split its summed dimension (split-k) if it has too few tiles for all SMs."""

FAMILIES = {
    "ampere": ("sustained_ampere", 400 / 312e12),
    "hopper": ("sustained_hopper", 700 / 989.4e12),
    "ada": ("sustained_hopper", 700 / 989.4e12),
    "blackwell": ("sustained_blackwell", 1200 / 2500e12),
}
"""Architecture -> (its field of `Constants`, watts per half-precision FLOP/s of the reference device of that field).

The reference devices are A100 SXM, H100 SXM (for Hopper and Ada) and GB200 (for Blackwell and Blackwell Ultra).
"""

LARGEST_SHARE = 0.96
"""Upper limit of the share of the datasheet's rate, however much power there is."""

UNLIMITED = ("float32", "float64")
"""Dtypes that do not use tensor cores, so that power does not limit their rate."""

NARROW = {"fp8": 2.0, "fp4": 4.0}
"""Dtype narrower than half precision -> its nominal rate relative to half precision."""

ELEMENT_BYTES = {
    "float64": 8.0,
    "float32": 4.0,
    "tf32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp4": 0.5,
}

CAUSAL_TILE = 128
"""Rows of a block of flash attention, which computes whole blocks on the diagonal in spite of the causal mask."""


def kernel_seconds(kernel: Kernel, device: Device, numbers: Constants | None = None) -> float:
    """Compute the seconds that a device is busy with all `kernel.count` runs of a kernel.

    Args:
        kernel: kernel to run.
        device: device from the catalogue or a cluster file.
        numbers: constants of the model; None selects the fitted ones.

    Raises:
        RequestError: The device has no rate for the kernel's dtype.
    """
    numbers = numbers or constants()
    if kernel.kind == "matmul" and len(kernel.shape) == 4:
        seconds = matmul_seconds(kernel, device, numbers) + numbers.product_start
    elif kernel.kind == "attention" and len(kernel.shape) == 5:
        seconds = attention_seconds(kernel, device, numbers) + numbers.product_start
    elif kernel.kind == "convolution" and len(kernel.shape) == 5:
        seconds = _as_matmul(kernel, device, numbers) + numbers.product_start
    else:
        seconds = _bytes_seconds(kernel.bytes, device, numbers) + numbers.kernel_start
    return kernel.count * seconds


def rate(device: Device, dtype: str) -> float:
    """Return the datasheet's FLOP/s of a device for a dtype.

    Raises:
        RequestError: The device has no rate for this dtype.
    """
    if dtype not in device.flops:
        known = ", ".join(sorted(device.flops))
        use = next((f": use precision={each}" for each in ("bf16", "float32") if each in device.flops), "")
        raise RequestError(f"{device.name} has no rate for {dtype}; it has rates for {known}{use}")
    return device.flops[dtype]


def sustained(device: Device, dtype: str, numbers: Constants) -> float:
    """Return the share of the datasheet's rate that large matmuls of a dtype sustain, between 0 and 1."""
    if dtype in UNLIMITED:
        return numbers.sustained_default
    half = device.flops.get("bf16") or device.flops.get("fp16")
    share = _powered(device, half, numbers)
    if half and dtype in NARROW:
        kept = numbers.sustained_fp8 if dtype == "fp8" else numbers.sustained_fp4
        share *= kept * NARROW[dtype] * half / rate(device, dtype)
    if dtype == "tf32":
        share *= numbers.sustained_tf32
    return min(share, LARGEST_SHARE)


def _powered(device: Device, half: float | None, numbers: Constants) -> float:
    """Return the share of the half-precision rate that a device sustains within its power limit.

    Families not in `FAMILIES` scale as Hopper does, up to `sustained_default`. That is also their share if the power or
    the half-precision rate is unknown.
    """
    own = FAMILIES.get(family(device))
    name, reference = own or FAMILIES["hopper"]
    share: float = getattr(numbers, name)
    if half and device.watts:
        share *= (device.watts / half / reference) ** numbers.power_exponent
    elif own is None:
        share = numbers.sustained_default
    return share if own else min(share, numbers.sustained_default)


def family(device: Device) -> str:
    """Return the first word of the architecture in lower case: `blackwell` for `Blackwell Ultra`."""
    return (device.architecture.lower().split() or [""])[0]


def matmul_seconds(kernel: Kernel, device: Device, numbers: Constants) -> float:
    """Compute the seconds of a matmul of shape (batch, m, n, k) with its fastest tile, without the kernel start.

    Raises:
        RequestError: The device has no rate for the kernel's dtype.
    """
    batch, m, n, k = kernel.shape
    per_sm = rate(device, kernel.dtype) * sustained(device, kernel.dtype, numbers) / device.cores
    best = min(
        _tiled(batch, m, n, k, tile, split, device.cores, numbers)
        for tile in TILES
        for split in SPLITS
        if split == 1 or k >= 512 * split
    )
    return max(best / per_sm, _bytes_seconds(kernel.bytes, device, numbers))


def _tiled(
    batch: int, m: int, n: int, k: int, tile: tuple[int, int], split: int, cores: int, numbers: Constants
) -> float:
    """Return the duration of a matmul with one tile and split, in FLOPs of one SM.

    Divided by the sustained rate of an SM it gives seconds.
    """
    rows, columns = tile
    tiles = batch * -(-m // rows) * -(-n // columns) * split
    whole, rest = divmod(tiles, cores)
    part = rest / cores
    waves = whole + (part + numbers.partial_wave * (1 - part) if rest else 0.0)
    overhead = 1 + numbers.tile_overhead * (1 / rows + 1 / columns)
    return waves * 2 * rows * columns * (k / split + numbers.prologue * (1 if split == 1 else 2)) * overhead


def attention_seconds(kernel: Kernel, device: Device, numbers: Constants) -> float:
    """Compute the seconds of flash attention, without the kernel start.

    The kernel has the shape (batch, heads, queries, keys, head size). By convention `kernel.flops` includes the causal
    half that the kernel skips.

    Raises:
        RequestError: The device has no rate for the kernel's dtype.
    """
    _, _, queries, _, size = kernel.shape
    unmasked = 1.0 if "dense" in kernel.operation else min(1.0, 0.5 + CAUSAL_TILE / (2 * queries))
    share = numbers.attention_backward if kernel.backward else numbers.attention_forward
    if family(device) in ("hopper", "blackwell"):
        share *= numbers.attention_fused if "cudnn" in kernel.operation else numbers.attention_hopper
    share *= (1 + numbers.attention_softmax / 128) / (1 + numbers.attention_softmax / size)
    seconds = kernel.flops * unmasked / (rate(device, kernel.dtype) * sustained(device, kernel.dtype, numbers) * share)
    return max(seconds, _bytes_seconds(kernel.bytes, device, numbers))


def _as_matmul(kernel: Kernel, device: Device, numbers: Constants) -> float:
    """Compute the seconds of a convolution as the implicit matmul that libraries run (Chetlur et al. 2014).

    In float32 it is a tf32 matmul where the device has any: PyTorch lets cuDNN round operands to tf32 by default, which
    it does not do for matmuls (`torch.backends.cudnn.allow_tf32`).
    """
    batch, inputs, outputs, positions, window = kernel.shape
    product = Kernel(
        kernel.operation,
        "matmul",
        "tf32" if kernel.dtype == "float32" and "tf32" in device.flops else kernel.dtype,
        kernel.flops,
        kernel.bytes,
        (1, batch * positions, outputs, inputs * window),
    )
    return matmul_seconds(product, device, numbers)


def _bytes_seconds(amount: float, device: Device, numbers: Constants) -> float:
    return amount / (device.memory_bandwidth * numbers.memory_share)
