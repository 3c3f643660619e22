"""Comparison of `shardwise.compat.horovod` with Horovod's source: names of all calls, their arguments in order.

The source is that of the release on PyPI, which pip downloads; nothing of it is built or run. Each public name of
`horovod.torch` must be here, and a call that passes arguments by place or by name must mean the same here. Ends with
exit status 1 if one does not.

    python -m benchmarks.horovod_calls [--source FOLDER]
"""

from __future__ import annotations

import argparse
import ast
import inspect
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shardwise.compat.horovod as ours

VERSION = "0.28.1"

FILES = (
    *("torch/mpi_ops.py", "torch/functions.py", "torch/optimizer.py", "torch/compression.py"),
    *("torch/elastic/__init__.py", "torch/elastic/state.py", "torch/elastic/sampler.py"),
    *("common/process_sets.py", "common/basics.py", "common/elastic.py"),
)
"""Files of Horovod with its calls, those that define a name for torch first."""

LEFT_OUT = {
    "start_timeline": "no timeline",
    "stop_timeline": "no timeline",
    "check_extension": "looks for Horovod's own library",
}
"""Names that docs/horovod.md says are not here, and why."""

CLASSES = {
    "ProcessSet": ours.ProcessSet,
    "TorchState": ours.elastic.TorchState,
    "ElasticSampler": ours.elastic.ElasticSampler,
    "Compressor": ours.Compression.none,
}
"""Classes whose methods are compared."""


def downloaded(folder: Path) -> Path:
    """Download Horovod's source into a folder and return where it lies."""
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps")
    options = ("--no-build-isolation", "--dest", str(folder), f"horovod=={VERSION}")
    subprocess.run([*command, *options], check=True)
    with tarfile.open(next(folder.glob("horovod-*.tar.gz"))) as archive:
        archive.extractall(folder, [each for each in archive if "/horovod/" in each.name], filter="data")
    return next(folder.glob("horovod-*/horovod"))


def definitions(source: Path) -> dict[str, ast.FunctionDef]:
    """Return Horovod's functions by name and its methods by `Class.name`."""
    found: dict[str, ast.FunctionDef] = {}
    for name in FILES:
        for node in ast.parse((source / name).read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, node)
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                found.update({f"{node.name}.{each.name}": each for each in methods})
    return found


def public_names(source: Path) -> list[str]:
    """Return the names that `horovod.torch` imports from its own modules."""
    tree = ast.parse((source / "torch/__init__.py").read_text())
    imports = [each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)]
    return [name.name for each in imports if str(each.module).startswith("horovod.") for name in each.names]


def difference(theirs: ast.FunctionDef, own: Any) -> str | None:
    """Return in what the arguments of a call differ. Returns None if a script cannot notice."""
    wanted = [each.arg for each in theirs.args.args if each.arg not in ("self", "cls")]
    needed = len(wanted) - len(theirs.args.defaults)
    known = list(inspect.signature(own).parameters.values())
    known = [each for each in known if each.name not in ("self", "cls")]
    names = [each.name for each in known]
    if theirs.args.vararg is None and names[: len(wanted)] != wanted:
        return f"arguments {', '.join(wanted)}; here {', '.join(names)}"
    required = [each.name for each in known if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    more = [each for each in required[needed:] if each != "args"]
    return f"needs {', '.join(more)}" if more else None


def differences(source: Path) -> Iterator[str]:
    """Yield a line for each name that is not here or is called otherwise."""
    defined = definitions(source)
    for name in public_names(source):
        if name in LEFT_OUT:
            continue
        if not hasattr(ours, name):
            yield f"{name}: is not here"
        elif (theirs := defined.get(name)) and (told := difference(theirs, getattr(ours, name))):
            yield f"{name}: {told}"
    for name, theirs in defined.items():
        kind, _, method = name.partition(".")
        if kind in CLASSES and not method.startswith("_"):
            own = getattr(CLASSES[kind], method, None)
            if told := "is not here" if own is None else difference(theirs, own):
                yield f"{name}: {told}"


def main() -> int:
    """Print the differences; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder `horovod` of its source; none: pip downloads it")
    with tempfile.TemporaryDirectory() as folder:
        source = parser.parse_args().source or downloaded(Path(folder))
        found, names = list(differences(source)), len(public_names(source))
    print("\n".join([*found, f"Horovod {VERSION}: {names - len(LEFT_OUT)} names, {len(found)} differ"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
