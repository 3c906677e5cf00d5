"""The kernels of the forced schedule, in Triton's interpreter where there is no CUDA device."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def test_kernels_equal_their_definitions() -> None:
    """In a process of its own: the interpreter's switch is read when a kernel is made."""
    script = Path(__file__).with_name("forced_interpreted.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
