"""Checks of a workload's data that need no worker: kinds of datasets, and samplers that fit them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from shardwise.errors import DataError
from shardwise.workload.data import is_map_style
from shardwise.workload.reading.order import epoch_batches
from shardwise.workload.workload import Workload


def check_data(workload: Workload) -> None:
    """Check the datasets of a workload, and the order that its `loading` gives.

    Raises:
        DataError: a dataset cannot be read, or the order is not one of its samples.
    """
    _check_dataset(workload.dataset, f"the dataset of workload {workload.name!r}")
    for evaluation in workload.evaluations:
        what = f"the held-out dataset{evaluation.name and f' {evaluation.name!r}'}"
        _check_dataset(evaluation.dataset, f"{what} of workload {workload.name!r}")
    loading = workload.loading
    if not is_map_style(workload.dataset):
        if loading.chooser is not None:
            raise DataError(
                f"the dataset of workload {workload.name!r} is a stream, which has its own order: a sampler needs one "
                "with __getitem__ and __len__"
            )
        return
    count = len(workload.dataset)
    if count == 0:
        raise DataError(f"the dataset of workload {workload.name!r} is empty: there is nothing to train on")
    if loading.drop_last and loading.chooser is None and count < workload.batch_size:
        raise DataError(
            f"batch_size={workload.batch_size} is more than the {count} samples of the dataset, and drop_last leaves "
            f"out smaller batches: use a batch_size of at most {count}"
        )
    if loading.chooser is not None:
        epoch_batches(count, workload.batch_size, loading, workload.seed, 0)


def _check_dataset(dataset: Any, what: str) -> None:
    """Raise DataError if a dataset can be read neither by index nor as a stream."""
    if isinstance(dataset, DataLoader):
        size = "" if dataset.batch_size is None else f" and batch_size={dataset.batch_size}"
        raise DataError(
            f"{what} is a DataLoader: give its dataset (loader.dataset){size} instead, its collate_fn as collate, its "
            "sampler and num_workers as loading=Loading(sampler=..., processes=...)"
        )
    if is_map_style(dataset):
        if not hasattr(dataset, "__len__"):
            raise DataError(f"{what}, a {type(dataset).__name__}, has __getitem__ but no __len__: add it")
    elif not hasattr(dataset, "__iter__"):
        raise DataError(
            f"{what}, a {type(dataset).__name__}, cannot be read: it needs __getitem__ and __len__, or __iter__"
        )
