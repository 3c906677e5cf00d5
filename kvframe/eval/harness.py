"""lm-eval (EleutherAI's language model evaluation harness) with a model that decodes under a policy.

Needs the extra `lm-eval`. The harness's own class reads a question and its answer in one forward pass, where a policy
has nothing to do; here the question is read like a prompt, and the answer goes through decode steps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from kvframe.composition import Policy
from kvframe.eval.forced import full_logits, run_forced
from kvframe.eval.tasks import Sample, Turn
from kvframe.options import option_names, parse_options
from kvframe.registry import default_registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Question and answer as text, where they are to be cached, and both as token ids."""


class PolicyLM(HFLM):  # type: ignore[misc]  # the harness ships no types
    """`HFLM` under a policy.

    Log-likelihoods: the context is read in full, every token of the continuation is predicted by a decode step, one
    request at a time. Generation: `generate` of the attached model, in batches.
    """

    def __init__(self, pretrained: "str | PreTrainedModel", policy: Policy | str = "full", **options: Any) -> None:
        """A model, by name or loaded, under a policy, by name or made.

        options: those of the policy, if it is given by name; all others are `HFLM`'s.

        Raises UnknownNameError and ConfigError for a policy that cannot be made.
        """
        if isinstance(policy, str):
            record = default_registry().policy_spec(policy)
            own = {name: options.pop(name) for name in option_names(record.config_cls) if name in options}
            # Options come as text from the harness's own command line.
            text = [f"{name}={value}" for name, value in own.items() if isinstance(value, str)]
            policy = record.make(**own | parse_options(record.config_cls, text))
        self.policy = policy
        super().__init__(pretrained, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability, and whether it is what greedy decoding would say."""
        found: list[tuple[float, bool]] = []
        last: tuple[list[int], Tensor] | None = None
        for text, context, continuation in tqdm(requests, disable=disable_tqdm or len(requests) < 2):
            context = context[-max(1, self.max_length - len(continuation)) :]
            if last is not None and len(continuation) == 1 and context == last[0]:
                logits = last[1][:1]  # another choice of one token for the same question
            else:
                logits = self._logits(context, continuation)
                last = (context, logits)
            answer = _judge(logits, continuation)
            found.append(answer)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def _logits(self, context: list[int], continuation: list[int]) -> Tensor:
        """[n, vocabulary]: what is predicted for each token of the continuation."""
        if len(context) > 1:
            return run_forced(self.model, self.policy, _sample(context, continuation)).logits
        # A prompt has two tokens: of a text without context the first one is predicted before there is a cache.
        first = full_logits(self.model, _sample(context, continuation[:1]))
        if len(continuation) == 1:
            return first
        rest = run_forced(self.model, self.policy, _sample([*context, continuation[0]], continuation[1:])).logits
        return torch.cat([first, rest])

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        from kvframe.hf import attach

        with attach(self.model, self.policy):
            generated: Tensor = super()._model_generate(context, max_length, stop, **options)
            return generated

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"kvframe_policy": self.policy.to_dict()}


def _sample(context: list[int], continuation: list[int]) -> Sample:
    return Sample(
        turns=(Turn(prompt_ids=torch.tensor(context), continuation_ids=torch.tensor(continuation)),),
    )


def _judge(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    log_probs = logits.float().log_softmax(-1)
    wanted = torch.tensor(continuation, device=logits.device)
    total = float(log_probs.gather(-1, wanted[:, None]).sum())
    return total, bool((log_probs.argmax(-1) == wanted).all())
