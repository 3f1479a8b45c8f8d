"""Where the user's files live."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """This user's caches, and what `subquad doctor` and `subquad compare kernels --tune` found on their GPUs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subquad"
