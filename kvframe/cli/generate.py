"""`kvframe generate`: any model, any prompt, any policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from kvframe.cli.console import check_choice, out, print_json
from kvframe.cli.listing import JSON
from kvframe.cli.models import DTYPES
from kvframe.cli.show import POLICY, SET
from kvframe.errors import ConfigError
from kvframe.types import Execution

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

DTYPE = Annotated[str, typer.Option(help="auto (that of the weights), float32, bfloat16 or float16.")]
MODEL = Annotated[str, typer.Argument(help="A directory with a model, or its name on the hub.")]


def generate(
    model: MODEL,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt.")] = None,
    policy: POLICY = "louiskv",
    set_: SET = None,
    calibration: Annotated[Path | None, typer.Option(help="What `kvframe calibrate --output` wrote; sets tau.")] = None,
    execution: Annotated[str, typer.Option(help="offload, dense or shadow.")] = "offload",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    prefill_chunk_size: Annotated[int | None, typer.Option(min=1, help="Read the prompt in chunks.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Put the prompt into the model's chat template; if it has one, by default."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sample; greedy without.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    dtype: DTYPE = "auto",
    json: JSON = False,
) -> None:
    """Generate text under a policy: streams it, then prints the report."""
    from kvframe.options import parse_options
    from kvframe.registry import default_registry

    check_choice("--execution", execution, get_args(Execution))
    check_choice("--dtype", dtype, DTYPES)
    text = _read_prompt(prompt, prompt_file)
    record = default_registry().policy_spec(policy)
    options = parse_options(record.config_cls, set_ or [])
    if calibration is not None:
        _apply(calibration, options, record)
    made = record.make(**options)

    import torch

    from kvframe.cli.models import load
    from kvframe.cli.running import generate_text

    loaded, tokenizer = load(model, dtype, quiet=json)
    input_ids = _encode(tokenizer, text, chat)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    generated = generate_text(
        loaded,
        tokenizer,
        input_ids,
        made,
        execution=execution,  # type: ignore[arg-type]  # checked above
        prefill_chunk_size=prefill_chunk_size,
        quiet=json,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    if json:
        print_json(generated.to_dict())
        return
    out().rule()
    out().print(str(generated.report), markup=False)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("expected a prompt by either --prompt or --prompt-file, got both or neither")
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the prompt {prompt_file}: {error}") from error
    if not prompt:
        raise ConfigError("the prompt is empty; expected some text")
    return prompt


def _apply(path: Path, options: dict[str, Any], record: Any) -> None:
    """Put what a calibration found into a policy's options."""
    from kvframe.calibration import Calibration
    from kvframe.options import option_names

    for name, value in Calibration.load(path).options.items():
        if name not in option_names(record.config_cls):
            raise ConfigError(f"--calibration sets {name}, which policy {record.name!r} does not have; leave it out")
        if options.setdefault(name, value) != value:
            raise ConfigError(f"--calibration and --set both give {name}; keep one")


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool | None) -> "torch.Tensor":
    """Token ids [1, T]."""
    if chat and tokenizer.chat_template is None:
        raise ConfigError("--chat needs a tokenizer with a chat template, and this model's has none; use --no-chat")
    if chat is None:
        chat = tokenizer.chat_template is not None
    if chat:
        turn = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    # A template writes its special tokens itself. The length is the user's business, not the tokenizer's.
    encoded: Any = tokenizer(text, add_special_tokens=not chat, return_tensors="pt", verbose=False)["input_ids"]
    if encoded.shape[1] == 0:
        raise ConfigError("the prompt has no tokens; expected some text")
    return encoded.long()  # type: ignore[no-any-return]
