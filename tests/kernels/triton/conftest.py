"""Where kernels are tested: on a CUDA device, or in Triton's interpreter on the CPU (TRITON_INTERPRET=1).

Without either, everything here is skipped; `tests/kernels/test_interpreted.py` runs it in a process of its own.
"""

import os

import pytest
import torch
from hypothesis import Phase, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("kernels need a CUDA device or TRITON_INTERPRET=1")


# The interpreter is too slow for a failing example to be made smaller.
settings.register_profile("kernels", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
