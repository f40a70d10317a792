"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real weights, datasets and reference outputs; skip the test where there is none.

    DARKSLIM_DATA names it; a relative path counts from the root of the repository.
    """
    folder = (ROOT / os.environ.get("DARKSLIM_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data at {str(folder)!r} (set DARKSLIM_DATA)")
    return folder
