"""The notebook of the lesson runs as it is, on local workers, and checks its own answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import ROOT

nbformat = pytest.importorskip("nbformat", reason="it is installed with Python 3.11 and newer")
nbclient = pytest.importorskip("nbclient", reason="it is installed with Python 3.11 and newer")

LESSON = ROOT / "docs" / "lesson.ipynb"
ANSWER = "# your answer"


def test_lesson(tmp_path: Path) -> None:
    notebook = nbformat.read(LESSON, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stdout"
    ]
    assert any("largest difference of the losses" in text for text in printed)


def test_lesson_has_exercises_and_no_outputs() -> None:
    notebook = nbformat.read(LESSON, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    exercises = [cell for cell in code if ANSWER in cell.source]
    assert len(exercises) == 6
    assert all("\nassert " in cell.source for cell in exercises)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
