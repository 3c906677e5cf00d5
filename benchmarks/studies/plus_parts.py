"""What louiskv-plus is made of, one part at a time, every variant selecting anew at every step.

    kvframe ablate benchmarks/studies/plus_parts.py

LouisKV, LouisKV with each part alone, all of them, and all with other options; beside them the exact top tokens.
Needles and a verbatim copy at 4K: 32 sinks, 128 recent tokens, 256 retrieved. The environment's variables are those of
long_context.py.
"""

import attrs
from long_context import COMMON, SIZES, budgets

import kvframe
import kvframe.eval

louiskv = kvframe.policy("louiskv", **SIZES).swap(trigger=kvframe.EveryStep())
plus = kvframe.policy("louiskv-plus", **SIZES).swap(trigger=kvframe.EveryStep())
sketch = plus.selector.selector

# The ranking by a sketch has no use for the means of values; the estimate has.
estimate_alone = plus.swap(name="estimate alone", selector=kvframe.EstimateRest(selector=louiskv.selector))
sketch_alone = louiskv.swap(name="sketch alone", scorer=plus.scorer, selector=sketch)


def but(name: str, **options: object) -> kvframe.Policy:
    """All parts, the sketch with other options."""
    return plus.swap(name=name, selector=attrs.evolve(plus.selector, selector=attrs.evolve(sketch, **options)))


study = kvframe.eval.Study(
    title="louiskv-plus, part by part, selecting at every step",
    policies=[
        kvframe.policy("oracle_topk", **SIZES),
        louiskv,
        estimate_alone,
        sketch_alone,
        plus,
        but("all, half the candidates", oversample=8),
        but("all, sketch of 2 bits", bits=2),
        but("all, runs of 4", run_length=4),
        but("all, sizes of channels", scales="channel"),
    ],
    token_budget=budgets,
    **COMMON,
)
