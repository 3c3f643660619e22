"""Run no code that lies in a folder or a file from elsewhere; say closed streams before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import Run

from shardwise import api
from shardwise.cli import main
from shardwise.errors import RequestError
from shardwise.run.training.job import Job
from shardwise.run.training.result import Trained
from shardwise.starting import leave_out_working_directory

PLAN = 'version = 1\nworkload = "{workload}"\ncluster = "h100x2"\nstrategy = "dp=2"\n'
GPT = "gpt:layers=1,hidden=64,heads=2"
MARK = "import pathlib; pathlib.Path({path!r}).touch()\n"
SHADOWED = ("transformers", "torch", "numpy", "safetensors", "nibabel", "argparse", "sklearn", "cloudpickle")
"""Installed packages, and a module of Python's own, which a hostile folder has too."""

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A downloaded model's folder, with packages in it that leave a mark where they are imported."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in SHADOWED:
        code = MARK.format(path=str(tmp_path / f"ran-{name}"))
        (folder / f"{name}.py").write_text(code)
    (folder / "transformers.py").unlink()
    (folder / "transformers").mkdir()
    (folder / "transformers" / "__init__.py").write_text(MARK.format(path=str(tmp_path / "ran-transformers")))
    (folder / "config.json").write_text(json.dumps({**LLAMA, **SMALL}))
    return folder


def ran(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.glob("ran-*")]


SCRIPT = [sys.executable, "-c", "from shardwise.cli import command; command()"]
"""Start like the script `shardwise`, whose folder is on the import path only where `-c` puts it."""


@pytest.mark.parametrize("start", [[sys.executable, "-m", "shardwise"], SCRIPT], ids=["module", "script"])
@pytest.mark.parametrize("path", ["", ":"], ids=["plain", "empty-entry"])
def test_the_working_directory_shadows_no_installed_package(
    start: list[str], path: str, hostile: Path, tmp_path: Path
) -> None:
    if start is SCRIPT:  # an empty entry shadows what a script imports before Shardwise: Python's own modules
        (hostile / "argparse.py").unlink()
    ours = str(Path(api.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{ours}{path}", "SHARDWISE_CLUSTER": "off"}
    arguments = ["simulate", ".", "--cluster", "h100x2", "--strategy", "dp=2", "--quiet"]
    command = [*start, *arguments]
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, check=False)
    assert ran(tmp_path) == []
    assert done.returncode == 0, done.stderr


def test_workers_import_nothing_from_the_working_directory(hostile: Path, tmp_path: Path) -> None:
    arguments = ["train", "image", "--steps", "1", "--strategy", "single", "--quiet", "--out", "run"]
    shrunk = ["--set", "layers=1", "--set", "hidden=8", "--set", "heads=1", "--set", "batch_size=8"]
    command = [sys.executable, "-m", "shardwise", *arguments, *shrunk]
    done = subprocess.run(command, cwd=hostile, capture_output=True, text=True, check=False)
    assert ran(tmp_path) == []
    assert done.returncode == 0, done.stderr


def test_folders_that_are_named_stay_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", "/elsewhere"])
    leave_out_working_directory()
    assert sys.path == ["/elsewhere"]
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/elsewhere"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    leave_out_working_directory()
    assert sys.path == [str(tmp_path), "/elsewhere"]


class TestPlanFiles:
    @pytest.mark.parametrize("workload", ["os:system", "shutil:rmtree", "evil.py:run", "gpt:run"])
    def test_a_function_that_only_the_file_names_is_not_run(
        self, workload: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        mark = MARK.format(path=str(folder / "ran-evil"))
        for name in ("evil.py", "gpt.py"):
            (folder / name).write_text(f"{mark}\ndef run(command=''): pass\n")
        settings = f"[settings]\ncommand = 'touch {folder / 'ran-evil'}'\n"
        (folder / "evil.toml").write_text(PLAN.format(workload=workload) + settings)
        assert main(["plan", "--check", "evil.toml"]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert f"name it too: shardwise plan {workload} --check evil.toml" in errors
        assert ran(folder) == []
        with pytest.raises(RequestError, match="is a function"):
            api.check_plan("evil.toml")

    def test_a_function_that_is_named_twice_is_run(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "plan.toml").write_text(PLAN.format(workload="work.py:small"))
        assert main(["plan", "work.py:small", "--check", "plan.toml"]) == 0
        assert api.check_plan("plan.toml", workload="work.py:small")["holds"]

    def test_the_names_must_agree(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "plan.toml").write_text(PLAN.format(workload="os:system"))
        assert main(["plan", "work.py:small", "--check", "plan.toml"]) == 2
        assert "is of workload 'os:system', not 'work.py:small'" in capsys.readouterr().err

    def test_sizes_need_no_second_name(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "plan.toml").write_text(PLAN.format(workload=GPT))
        assert main(["plan", "--check", "plan.toml"]) == 0


def shell(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = f'exec "$@" {redirection}'
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "shardwise", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


class TestClosedStreams:
    def test_standard_output(self, folder: Path) -> None:
        done = shell(">&-", "train", "work.py:small", "--steps", "1", "--out", "run")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "shardwise: standard output is closed: send it to a file, or to /dev/null\n"
        assert not (folder / "run").exists()

    def test_standard_error(self, folder: Path) -> None:
        done = shell("2>&-", "train", "work.py:small", "--steps", "1", "--out", "run")
        assert (done.returncode, done.stderr) == (2, "")
        assert done.stdout == "shardwise: standard error is closed: send it to a file, or to /dev/null\n"
        assert not (folder / "run").exists()

    def test_both(self, folder: Path) -> None:
        assert shell(">&- 2>&-", "train", "work.py:small", "--out", "run").returncode == 2
        assert not (folder / "run").exists()

    def test_no_file_gets_the_number_of_a_closed_stream(self) -> None:
        code = "import os, sys; from shardwise.starting import check_streams; check_streams(); "
        code += "sys.exit(os.open('/dev/null', os.O_RDONLY) < 3 or not os.get_inheritable(0))"
        line = f'exec "{sys.executable}" -c "{code}" <&-'
        assert subprocess.run(["bash", "-c", line], check=False).returncode == 0


@pytest.mark.parametrize("place", ["import", "build", "train"])
@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "sys.exit()", "raise SystemExit"])
def test_code_that_ends_the_program_is_no_success(
    place: str, end: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if place == "train" and "os._exit" in end:
        pytest.skip("only what is loaded is watched")
    text = (folder / "work.py").read_text()
    lines = {
        "import": f"import os, sys\n{end}\n{text}",
        "build": text.replace("    generator =", f"    import sys\n    {end}\n    generator ="),
        "train": text.replace("lambda: nn.Sequential(", "lambda: ended() or nn.Sequential(")
        + f"\ndef ended():\n    import sys\n    {end}\n",
    }
    (folder / "ends.py").write_text(lines[place])
    command = ["simulate", "ends.py:small", "--cluster", "h100x2", "--strategy", "dp=2", "--quiet"]
    assert main(command) == (1 if place == "train" else 2)
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert "end" in errors


def test_a_forked_process_of_a_workload_may_end(run: Run, folder: Path) -> None:
    text = (
        (folder / "work.py")
        .read_text()
        .replace(
            "    generator =",
            "    child = os.fork()\n    if child == 0:\n        os._exit(7)\n"
            "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n    generator =",
        )
    )
    (folder / "forks.py").write_text(text)
    run("simulate", "forks.py:small", "--cluster", "h100x2", "--strategy", "dp=2")


class TestNothingCanBeKept:
    @pytest.fixture(autouse=True)
    def _home(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "home").write_text("a file, in which no folder can be made, not even by root")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        monkeypatch.delenv("SHARDWISE_CLUSTER")

        def measure(*_: object, **__: object) -> None:
            raise AssertionError("the machine was measured")

        monkeypatch.setattr("shardwise.run.calibration.calibrate.calibrate", measure)

    def test_by_name_it_is_refused_at_once(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "work.py:small", "--strategy", "auto"]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert f"cannot be kept in {folder / 'home' / 'shardwise'} (Not a directory): set XDG_CACHE_HOME" in errors
        assert main(["plan", "work.py:small"]) == 2

    def test_else_it_is_said_and_trained(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def run_reported(job: Job) -> Trained:
            return Trained({"strategy": str(job.strategy)}, (), {})

        monkeypatch.setattr("shardwise.commands.auto.run_reported", run_reported)
        document = api.train("work.py:small", steps=1, workers=2)
        assert document["strategy"] == "dp=2"
        assert "strategy dp=2, for nothing can be chosen: what is measured cannot be kept in" in capsys.readouterr().err
