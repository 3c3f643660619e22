"""Checkpoints that somebody edits and signs again, so that all checksums hold."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any


def sign(folder: Path, *more: str) -> None:
    """Writes a manifest that fits the files of the checkpoint as they are now; `more` are names to put in besides."""
    names = sorted({path.name for path in folder.iterdir() if path.name != "manifest.json"} | set(more))
    files = {}
    for name in names:
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        files[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    own = zlib.crc32(json.dumps(files, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps({"files": files, "crc32": own}))


def edit(folder: Path, change: Any) -> None:
    """Lets `change` edit the index, and signs."""
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))
    sign(folder)


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body
