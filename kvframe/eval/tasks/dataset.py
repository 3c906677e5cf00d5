"""Questions of a data set that lies in a local file: LongBench, RULER, InfiniteBench, or one of one's own."""

import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs
from attrs import field, frozen

from kvframe.errors import ConfigError
from kvframe.eval.identity import file_digest
from kvframe.eval.tasks.base import Encoder, Piece, Sample, Task, Turn, to_tensor
from kvframe.eval.tasks.records import FIELDS, Format, Record, read_records
from kvframe.eval.tasks.scoring import RULES, Rule, Scorer
from kvframe.eval.text import Haystack
from kvframe.validators import integer, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARE_TEMPLATE = "Question: {question}\n{options}Answer:"
TEMPLATE = "{context}\n\n" + BARE_TEMPLATE

_RULES: dict[Format, Rule] = {"ruler": "all", "longbench": "f1", "infinitebench": "any", "questions": "any"}
_PLACES = re.compile(r"\{(context|question|options)\}")


def _to_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _file(instance: "Dataset", attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or not Path(value).is_file():
        raise ConfigError(f"Dataset.path must be a file with samples; there is no file {value}")


def _template(instance: "Dataset", attribute: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or "{question}" not in value):
        raise ConfigError(f"Dataset.template must be a text with {{question}} in it, got {value!r}")


@frozen(kw_only=True)
class Dataset(Task):
    """Questions and answers from a local file, in the format of LongBench, RULER or InfiniteBench, or with `question`
    and `answer`. The seed is the number of the sample, from 0; nothing is random, and no haystack is needed.

    Under the policy the model is made to say the first answer, or all of them where all are asked for.
    """

    name: ClassVar[str] = "dataset"
    path: str = field(converter=_to_text, validator=_file)
    """JSON lines, or a JSON list."""
    format: Literal["auto", "ruler", "longbench", "infinitebench", "questions"] = field(
        default="auto", validator=one_of("auto", *FIELDS)
    )
    """Which fields a sample has; seen from the first one without."""
    scoring: Literal["auto", "all", "any", "f1", "exact", "number"] = field(
        default="auto", validator=one_of("auto", *RULES)
    )
    """How a free generation is scored; auto: all for RULER, f1 for LongBench, any for others."""
    template: str | None = field(default=None, validator=_template)
    """Prompt with {context}, {question} and {options}; RULER's prompts are whole, others end with "Answer:" without."""
    truncate: Literal["never", "middle"] = field(default="never", validator=one_of("never", "middle"))
    """What becomes of a prompt that is longer than the context: an error, or it loses its middle, as LongBench does."""
    max_new_tokens: int = field(default=64, validator=integer(at_least=1))
    """Tokens to generate freely."""

    def make(self, tokenizer: "PreTrainedTokenizerBase", context_tokens: int, seed: int, haystack: Haystack) -> Sample:
        """Sample number `seed`, of at most `context_tokens` tokens.

        Raises ConfigError for a number beyond the file's last, for a file that cannot be read, and for a sample that is
        longer and may not be cut.
        """
        kind, records = self.records()
        if not 0 <= seed < len(records):
            raise ConfigError(
                f"{Path(self.path).name} has {len(records)} samples, numbered from 0; seed {seed} asks for one that is "
                "not there"
            )
        return self._sample(Encoder(tokenizer), context_tokens, kind, records[seed], seed)

    def records(self) -> tuple[Format, Sequence[Record]]:
        """The format of the file, and its samples. Raises ConfigError where it cannot be read."""
        return read_records(self.path, self.format)

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        raise NotImplementedError("a data set's samples are numbered, not drawn")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the file by its name and content, for where it lies decides nothing."""
        state = Path(self.path).stat()
        digest = _digest(self.path, state.st_mtime_ns, state.st_size)
        return {"task": self.name} | attrs.asdict(self) | {"path": f"{Path(self.path).name} (sha256 {digest[:12]})"}

    def _sample(self, encoder: Encoder, context_tokens: int, kind: Format, record: Record, number: int) -> Sample:
        rule = _RULES[kind] if self.scoring == "auto" else self.scoring
        pieces: list[Piece] = []
        for place, answer in enumerate(record.answers if rule == "all" else record.answers[:1]):
            pieces += [("," if place else "", False), (f" {answer}", True)]
        continuation, answers = encoder.marked([*pieces, ("\n", False)])
        prompt = encoder.ids(self._prompt(kind, record))
        room = self.room(context_tokens, len(encoder.beginning) + len(continuation), at_least=2)
        if len(prompt) > room:
            if self.truncate == "never":
                whole = context_tokens - room + len(prompt)
                raise ConfigError(
                    f"sample {number} of {Path(self.path).name} has {whole} tokens, {context_tokens} are allowed; ask "
                    "for a longer context, take a model that reads more, or cut it with truncate='middle'"
                )
            prompt = prompt[: room // 2] + prompt[len(prompt) - (room - room // 2) :]
        turn = Turn(
            prompt_ids=to_tensor(encoder.beginning, prompt), continuation_ids=to_tensor(continuation), answers=answers
        )
        return Sample(
            turns=(turn,),
            expected=record.answers if rule == "all" else record.answers[:1],
            scorer=Scorer(rule, record.answers),
            max_new_tokens=self.max_new_tokens,
        )

    def _prompt(self, kind: Format, record: Record) -> str:
        template = self.template or ("{question}" if kind == "ruler" else TEMPLATE if record.context else BARE_TEMPLATE)
        options = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCDEFGHIJ", record.options))
        parts = {"context": record.context, "question": record.question, "options": options}
        prompt = _PLACES.sub(lambda found: parts[found[1]], template)
        return prompt + record.prefix


@functools.lru_cache(maxsize=16)
def _digest(path: str, changed: int, size: int) -> str:
    return file_digest(path)
