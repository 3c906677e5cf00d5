"""The sweep over every causal-LM family of transformers: which are served, which are refused, and why."""

from kvframe.hf.families.command import run_sweep
from kvframe.hf.families.configs import build_config, build_model, model_types
from kvframe.hf.families.outcome import Outcome, Status
from kvframe.hf.families.sweep import outcomes

__all__ = ["Outcome", "Status", "build_config", "build_model", "model_types", "outcomes", "run_sweep"]
