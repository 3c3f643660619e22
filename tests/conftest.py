from __future__ import annotations

import gc
import os
import tempfile

import pytest
import warm
from traces import FOLDER

# Threads that are done with their part would wait for the others in a loop, and keep cores from the tests beside them.
# Everything that tests start inherits it; torch reads it when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests make many objects and hardly any garbage: the collector takes less time when it looks for it less often.
gc.set_threshold(20_000, 20, 20)

# Tests predict nothing but where they say so: measuring the machine first would take half a minute.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reads it when torch is loaded
os.environ.setdefault("SHARDWISE_CLUSTER", "off")

SLOW = (
    "test_readme.py",
    "test_dry_run.py",
    "test_tensor_parallel.py",
    "test_crosscheck.py",
    "test_plan.py",
    "test_compression.py",
    "test_compiled.py",
    "test_calibration.py",
    "test_precisions_alike.py",
    "test_killed_worker.py",
    "test_playback.py",
    "test_pipeline.py",
    "test_products.py",
    "test_site.py",
    "test_lesson.py",
    "test_catalogue.py",
    "test_data_parallel.py",
    "test_huggingface.py",
    "test_keras.py",
    "test_script_objects.py",
    "test_horovod_operations.py",
    "test_horovod_scripts.py",
    "test_checkpoint_workers.py",
    "test_loading.py",
    "test_watch.py",
    "test_doors.py",
    "test_deepen.py",
    "test_own_backward.py",
    "test_local.py",
    "test_offload.py",
    "test_auto.py",
    "test_dry_run_alone.py",
    "test_stopping.py",
    "test_launchers.py",
    "test_going_on.py",
    "test_pareto.py",
    "test_timeline.py",
    "test_other_software.py",
    "test_memos.py",
    "test_memory_balance.py",
    "test_evaluating.py",
)
"""Files that begin first, longest first: one that begins last would be waited for by the other process."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of the traces that all processes of this session share; those that it starts inherit its name."""
    if FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="shardwise-traces-")
        config.add_cleanup(folder.cleanup)
        os.environ[FOLDER] = folder.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """Keep what is alive when a file begins out of later collections: dry runs and profiled steps each make a full one.

    What the files before have left is collected first, so that nothing stays that nobody uses.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def warm_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that the test's own process starts are forked, and take a second less each."""
    warm.start_here(warm.server_address(), monkeypatch.setattr)
