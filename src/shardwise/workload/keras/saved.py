"""Weights that Keras has saved, also with TensorFlow: read by Keras's own reader of HDF5, without TensorFlow or pickle.

A `.keras` file also has a configuration. It is not read: the model is the one that you have, and no code of the file
runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwise.errors import WorkloadError
from shardwise.files import check_regular

SUFFIXES = (".weights.h5", ".keras", ".h5")
"""Names of files with weights; the last is the form of Keras 2."""


def load_saved_weights(model: Any, path: str | Path) -> None:
    """Replace the variables of a built Keras model by those in a file.

    Raises:
        WorkloadError: the file is of another kind, cannot be read, or does not fit the model.
    """
    name = str(path)
    if not name.endswith(SUFFIXES):
        raise WorkloadError(
            f"{name}: weights of Keras are in files {', '.join(SUFFIXES)}: a SavedModel or checkpoint of TensorFlow "
            "must be saved again there, with model.save_weights('NAME.weights.h5')"
        )
    check_regular(Path(name), WorkloadError)
    try:
        model.load_weights(name)
    except Exception as error:
        raise WorkloadError(
            f"{name} does not fit the model, or cannot be read: {type(error).__name__}: {error}"
        ) from error
