"""The peer's own environment: a venv in the work folder, from pinned versions, made once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("peer-constraints.txt")
REQUIREMENTS = ("trl", "peft")
"""TRL brings transformers, torch, datasets and accelerate; versions are the constraints'."""


def peer_python(work: Path) -> Path:
    """The interpreter of the peer's environment, made first if it is not there.

    Its folder carries a digest of the constraints, so an environment of other versions is never taken for it; a file
    `complete` in it says that the installation was not cut short. Raises CalledProcessError where pip fails (its
    messages are on stderr).
    """
    digest = hashlib.sha256(CONSTRAINTS.read_bytes() + sys.version.encode()).hexdigest()[:8]
    folder = work / f"venv-peer-{digest}"
    python = folder / "bin" / "python"
    if (folder / "complete").is_file():
        return python
    print(f"making the peer's environment in {folder} (once)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)  # of an installation that was killed; a venv cannot be renamed
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", str(CONSTRAINTS), *REQUIREMENTS], check=True, stdout=sys.stderr)
    (folder / "complete").touch()
    return python
