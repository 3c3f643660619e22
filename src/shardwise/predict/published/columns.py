"""Columns of a table of published runs, under any of their usual names, and readers of their cells.

"TP size" -> tp    "Global batch size" -> global_batch    "1,536" -> 1536    "n/a" -> nothing
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from shardwise.errors import one_line
from shardwise.units import parse_number

NAMES: dict[str, str] = {
    "group": "",
    "source": "",
    "ref": "",
    "table": "",
    "model": "model_name",
    "params_b": "params parameters_b parameters params_billion params_billions model_size_b",
    "layers": "n_layers num_layers n_layer num_hidden_layers blocks depth",
    "hidden": "hidden_size d_model n_embd width hidden_dim dim",
    "heads": "n_heads num_heads n_head num_attention_heads attention_heads",
    "kv_heads": "n_kv_heads num_kv_heads num_key_value_heads num_query_groups query_groups",
    "ffn": "ffn_hidden_size ffn_hidden ffn_size intermediate_size d_ff mlp_hidden",
    "vocab": "vocab_size vocabulary vocabulary_size n_vocab padded_vocab_size",
    "seq_len": "seq sequence sequence_length seq_length seqlen context_length max_seq_len",
    "gpu": "gpus_kind gpu_type gpu_model gpu_name device device_type device_name accelerator hardware hw",
    "n_gpus": "gpus num_gpus gpu_count ngpus devices n_devices num_devices world_size workers",
    "gpus_per_node": "devices_per_node gpus_node",
    "interconnect": "network links fabric",
    "tp": "tensor_parallel tensor_parallel_size tp_size tensor_model_parallel_size tensor",
    "pp": "pipeline_parallel pipeline_parallel_size pp_size pipeline_model_parallel_size pipeline",
    "dp": "data_parallel data_parallel_size dp_size data",
    "cp": "context_parallel context_parallel_size cp_size",
    "ep": "expert_parallel expert_parallel_size ep_size",
    "vpp": "vp virtual_pipeline virtual_stages interleave virtual_pipeline_size chunks",
    "schedule": "pipeline_schedule pp_schedule",
    "zero_fsdp": "zero zero_stage fsdp sharding",
    "micro_batch": "mbs micro_batch_size microbatch microbatch_size",
    "global_batch": "gbs global_batch_size batch_size batch",
    "grad_accum": "gradient_accumulation grad_accumulation gradient_accumulation_steps grad_acc microbatches",
    "recompute": "recomputation activation_checkpointing gradient_checkpointing activation_recompute checkpointing ac",
    "precision": "dtype data_type",
    "compile": "compiled torch_compile",
    "target_step_time_s": "",
    "target_kind": "",
    "step_time_s": "step_time iteration_time_s iteration_time step_seconds iter_time_s seconds_per_step",
    "step_time_s_derived": "",
    "tokens_per_s_per_gpu": "tokens_per_sec_per_gpu tokens_per_second_per_gpu tok_s_gpu tps_per_gpu",
    "peak_mem_gib": "peak_memory_gib memory_gib max_memory_gib",
    "notes": "note remarks comment",
}
"""Column -> its other names, separated by spaces."""

EMPTY = {"", "-", "--", "n/a", "na", "nan", "null", "?", "unknown", "not stated", "not given", "unspecified"}
"""Cells that count as empty, in lower case."""

SMALLEST, LARGEST = 1e-9, 1e9
"""Bounds of a cell's number: no run has more of anything that these columns count."""

Row = Mapping[str, str]


def named(header: Sequence[str]) -> dict[str, str]:
    """Map each column of a file to the column of `NAMES` that it means; unknown columns keep their name.

    Raises:
        ValueError: two columns of the file mean the same one.
    """
    known = {_plain(other): name for name, others in NAMES.items() for other in (name, *others.split())}
    result: dict[str, str] = {}
    exact = {_plain(column) for column in header} & set(NAMES)
    for column in header:
        plain = _plain(column)
        meant = known.get(plain, column)
        if meant != plain and meant in exact:
            meant = column
        if meant in result.values():
            first = next(name for name, other in result.items() if other == meant)
            raise ValueError(f"columns {first!r} and {column!r} both mean {meant}; keep one")
        result[column] = meant
    return result


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")


def text(row: Row, column: str) -> str:
    """Return the text of a cell; the empty string if the cell is missing, empty or one of `EMPTY`."""
    cell = one_line(row.get(column) or "").strip()
    return "" if cell.lower() in EMPTY else cell


def number(row: Row, column: str) -> float | None:
    """Return the positive number in a cell.

    Returns None if the cell is empty.

    Raises:
        MissingColumn: the cell is not a number, or the number is out of bounds.
    """
    cell = text(row, column)
    if not cell or cell.lower() == "none":
        return None
    plain = cell.replace(",", "") if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", cell) else cell
    try:
        value = parse_number(plain)
    except ValueError:
        raise MissingColumn(f"{column} is {cell!r}, not a number") from None
    if not SMALLEST <= value <= LARGEST:
        raise MissingColumn(f"{column} is {cell}, " + ("not positive" if value <= 0 else "which no run has"))
    return value


def whole(row: Row, column: str) -> int | None:
    """Return the positive whole number in a cell.

    Returns None if the cell is empty.

    Raises:
        MissingColumn: the cell is not a whole number, or the number is out of bounds.
    """
    value = number(row, column)
    if value is not None and value != int(value):
        raise MissingColumn(f"{column} is {value:g}, not a whole number")
    return None if value is None else int(value)


def needed(row: Row, column: str) -> int:
    """Return the positive whole number in a cell that every row must fill.

    Raises:
        MissingColumn: the cell is empty, or not a whole number within bounds.
    """
    value = whole(row, column)
    if value is None:
        raise MissingColumn(f"no {column}")
    return value


def degree(row: Row, column: str) -> int:
    """Return the degree of parallelism in a cell: 1 if the cell is empty or 0, which some tables write for none."""
    return 1 if text(row, column) in ("0", "0.0") else whole(row, column) or 1


class MissingColumn(ValueError):
    """Raised for a row that lacks something needed or says something unknown; the message names it."""
