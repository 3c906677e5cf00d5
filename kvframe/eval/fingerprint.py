"""Telling models apart."""

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Elements of each parameter that are looked at.
_SAMPLE = 16
# What a config says of the way it was loaded, and not of the model.
_TRANSIENT = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "attn_implementation")


def fingerprint(model: "PreTrainedModel") -> str:
    """A digest of a model's config, and of name, shape and first elements of each parameter.

    The same weights in another dtype have the same digest: elements are compared in bfloat16.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _TRANSIENT}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter.detach().reshape(-1)[:_SAMPLE].to(torch.bfloat16).float().tolist()
        digest.update(json.dumps([name, list(parameter.shape), sample]).encode())
    return digest.hexdigest()
