"""Settings and fixtures shared by every test."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Read when torch and huggingface_hub are first imported, so they stand before every import that may bring those.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads give their core away: the machine may be shared
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network

import pytest
import torch
from hypothesis import HealthCheck, settings

from kvframe.models import find_smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of several processes (pytest -n 2) each has a core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

# Nothing in it depends on how fast the machine is, or on what an earlier run left behind.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
# pytest --hypothesis-profile=thorough
settings.register_profile("thorough", deadline=None, max_examples=1000, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile `ci` unless the command names one."""
    # not when this module is imported: a test that imports from it would undo the command's choice
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("ci")


class SmolLM2(NamedTuple):
    """The model in float32 and evaluation mode, its tokenizer, and where both came from."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    path: Path


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    """SmolLM2-135M-Instruct; skips without its files, or fails if KVFRAME_REQUIRE_MODEL=1."""
    path = find_smollm2()
    if path is None:
        reason = "SmolLM2-135M-Instruct has not been fetched; run: kvframe demo --download-only"
        if os.environ.get("KVFRAME_REQUIRE_MODEL") == "1":
            pytest.fail(f"KVFRAME_REQUIRE_MODEL=1, but {reason}")
        pytest.skip(reason)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return SmolLM2(model.eval(), tokenizer, path)
