"""Teacher forcing: what is predicted, and under what."""

import pytest
import torch
from eval.conftest import Tiny
from hf.tiny import louiskv, tight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvframe
from kvframe.errors import ConfigError
from kvframe.eval import Sample, Turn
from kvframe.eval.fidelity import compare_logits, in_answers, passed
from kvframe.eval.forced import context_limit, full_logits, run_forced


def random_sample(*lengths: tuple[int, int], seed: int = 0) -> Sample:
    """Turns of so many prompt and continuation tokens."""
    generator = torch.Generator().manual_seed(seed)
    parts = [[torch.randint(3, 200, (n,), generator=generator) for n in pair] for pair in lengths]
    return Sample(turns=tuple(Turn(prompt_ids=a, continuation_ids=b) for a, b in parts))


SAMPLE = random_sample((60, 25))
TURNS = random_sample((40, 9), (7, 5), (12, 11))


@pytest.mark.parametrize("sample", [SAMPLE, TURNS], ids=["one turn", "three turns"])
def test_full_logits_predict_the_continuation(sample: Sample, tiny: Tiny):
    """They are the rows of a plain pass that stand before the tokens of the continuations."""
    plain = tiny.model(sample.ids).logits[0]
    rows, start = [], 0
    for turn in sample.turns:
        rows += range(start + len(turn.prompt_ids) - 1, start + turn.num_tokens - 1)
        start += turn.num_tokens

    torch.testing.assert_close(full_logits(tiny.model, sample), plain[rows], atol=1e-10, rtol=0)


@pytest.mark.parametrize("sample", [SAMPLE, TURNS], ids=["one turn", "three turns"])
@pytest.mark.parametrize(
    "policy, execution",
    [("full", "offload"), ("large budget", "offload"), ("tight", "shadow")],
)
def test_forced_under_full_attention(sample: Sample, policy: str, execution: str, tiny: Tiny):
    """Where a policy attends to everything, or is only watched, the predictions are those of full attention."""
    made = {"full": kvframe.policy("full"), "large budget": louiskv(), "tight": tight()}[policy]
    run = run_forced(tiny.model, made, sample, execution=execution)

    torch.testing.assert_close(run.logits, full_logits(tiny.model, sample), atol=1e-8, rtol=0)
    assert run.report().num_decode_steps == sample.num_steps
    assert run.prefill_seconds > 0 and run.decode_seconds > 0 and run.peak_memory is None


def test_a_tight_policy_shows(tiny: Tiny):
    """With a budget the predictions differ, the same way in `offload` and `dense`."""
    runs = [run_forced(tiny.model, tight(), TURNS, execution=execution) for execution in ("offload", "dense")]

    torch.testing.assert_close(runs[0].logits, runs[1].logits, atol=1e-8, rtol=0)
    assert float((runs[0].logits - full_logits(tiny.model, TURNS)).abs().max()) > 1e-3


def test_the_observer_sees_every_step(tiny: Tiny):
    """With the cache as the step left it."""
    seen = []
    run_forced(tiny.model, tight(), TURNS, observer=lambda cache, step: seen.append((step, cache.get_seq_length())))

    assert [step for step, _ in seen] == list(range(TURNS.num_steps))
    # A turn's last token is read together with the prompt of the next.
    assert [length for _, length in seen] == [*range(40, 49), *range(56, 61), *range(73, 84)]


def test_longer_than_the_model(tiny: Tiny):
    """An error before anything runs."""
    sample = random_sample((4090, 7))

    assert context_limit(tiny.model.config) == 4096
    for call in (lambda: run_forced(tiny.model, tight(), sample), lambda: full_logits(tiny.model, sample)):
        with pytest.raises(ConfigError, match="the sample has 4097 tokens, the model reads at most 4096"):
            call()


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Two logits [n, V] and n targets; enough rows for several chunks."""
    n, width = draw(st.integers(1, 130)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    full, policy = (3 * torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return full, policy, torch.randint(0, width, (n,), generator=generator)


@given(predictions())
def test_fidelity_is_what_the_formulas_say(given: tuple[Tensor, Tensor, Tensor]):
    """Against plain loops over probabilities."""
    full, policy, targets = given
    found = compare_logits(full, policy, targets)
    for row in range(len(targets)):
        p, q = torch.softmax(full[row], 0).tolist(), torch.softmax(policy[row], 0).tolist()
        target = int(targets[row])
        kl = sum(a * (torch.log(torch.tensor(a / b, dtype=torch.float64))).item() for a, b in zip(p, q))
        assert float(found.kl[row]) == pytest.approx(kl, abs=1e-9)
        assert float(found.nll[row].neg().exp()) == pytest.approx(q[target], abs=1e-9)
        assert float(found.nll_full[row].neg().exp()) == pytest.approx(p[target], abs=1e-9)
        assert bool(found.agrees[row]) == (p.index(max(p)) == q.index(max(q)))
        assert bool(found.correct[row]) == (q.index(max(q)) == target)
        assert bool(found.correct_full[row]) == (p.index(max(p)) == target)


def test_a_token_that_full_attention_rules_out():
    """Minus infinity adds nothing; nothing becomes NaN."""
    full = torch.tensor([[0.0, -torch.inf, 0.0]])
    found = compare_logits(full, torch.zeros(1, 3), torch.tensor([0]))

    assert float(found.kl) == pytest.approx(float(torch.log(torch.tensor(1.5))), abs=1e-6)


def test_answers():
    """An answer is right if all its tokens are."""
    correct = torch.tensor([True, False, True, True, True])

    assert passed(correct, ((0, 2), (2, 4), (4, 5))) == [False, True, True]
    assert in_answers(5, ((1, 2), (3, 5))).tolist() == [False, True, False, True, True]
