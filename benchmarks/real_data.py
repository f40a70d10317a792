"""Where the real test data lies: the weights, pictures, datasets and references that are not in the repository."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def real_data() -> Path:
    """Give the folder that $DARKSLIM_DATA names, from the repository's root on; it need not be there."""
    return (ROOT / os.environ.get("DARKSLIM_DATA", "../shared/data")).resolve()
