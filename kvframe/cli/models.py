"""Loading a model and its tokenizer for a command."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvframe.cli.console import check_choice, waiting
from kvframe.errors import ConfigError
from kvframe.models import SMOLLM2, find_smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cuda", "cpu")
SHORT_NAME = "smollm2"
"""What SmolLM2 may be called for short."""


def load(
    name: str, dtype: str = "auto", device: str = "auto", *, quiet: bool = False
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal language model in evaluation mode and its tokenizer.

    name: a directory, or a name on the hub; SmolLM2, or "smollm2", is taken from where the demo keeps it.
    dtype: "auto" is that of the checkpoint.
    device: "auto" is the GPU if there is one.

    Raises ConfigError for anything that is no model, and for a device that is not there.
    """
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--device", device, DEVICES)
    source = _source(SMOLLM2 if name == SHORT_NAME else name)
    with waiting(f"loading {name}", quiet=quiet):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu")
        place: Any = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            with _silence():
                tokenizer = AutoTokenizer.from_pretrained(source)
                model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
        except Exception as error:
            # Which types a broken file or a missing network raises is up to several libraries.
            raise ConfigError(
                f"cannot load a causal language model from {name!r}: {_first_line(error)}; expected a directory that "
                "from_pretrained reads, or the name of one on the hub"
            ) from error
        return model.to(place).eval(), tokenizer


def read_config(name: str) -> "PreTrainedConfig":
    """The config of what `load` would load. Raises ConfigError for anything that is no model."""
    from transformers import AutoConfig

    try:
        with _silence():
            config: PreTrainedConfig = AutoConfig.from_pretrained(_source(name))
            return config
    except ConfigError:
        raise
    except Exception as error:
        # As in `load`.
        raise ConfigError(
            f"cannot read the config of {name!r}: {_first_line(error)}; expected a directory that from_pretrained "
            "reads, or the name of one on the hub"
        ) from error


def _source(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{name} is a directory without config.json; expected one that from_pretrained reads, with config, "
                "weights and tokenizer"
            )
        return str(folder)
    if folder.exists() or name.startswith((".", "~", "/")) or len(folder.parts) > 2:
        raise ConfigError(f"{name} is no directory; expected one that from_pretrained reads, or a name on the hub")
    fetched = find_smollm2() if name == SMOLLM2 else None
    return name if fetched is None else str(fetched)


@contextmanager
def _silence() -> Iterator[None]:
    """Neither bars nor remarks of transformers."""
    from transformers.utils import logging as settings

    logger = logging.getLogger("transformers")
    level, bars = logger.level, settings.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    settings.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            settings.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
