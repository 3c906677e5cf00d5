"""The boundary to transformers: the only part of kvframe that imports it.

Importing this package makes the attention name "kvframe" known to transformers, for models loaded with
attn_implementation="kvframe".
"""

from kvframe.hf.attachment import Run, attach
from kvframe.hf.attention import register
from kvframe.hf.cache import RetrievalCache
from kvframe.hf.support import ATTENTION_NAME

register()

__all__ = ["ATTENTION_NAME", "RetrievalCache", "Run", "attach"]
