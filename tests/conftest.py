"""Every test starts from the same seed, an empty parameter store and validated Pyro programs, on few threads."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyro
import pytest
import torch

# `make test` runs one worker per core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
if "HF_MODULES_CACHE" not in os.environ:  # for code beside weights; made and removed by the first process
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="orderppl-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    """Seed every generator, clear Pyro's parameters, validate distributions and programs."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (third-party code draws from the global generator)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
