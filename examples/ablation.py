"""One slot at a time: what each stage of a policy is worth, watched beside full attention.

    python examples/ablation.py [--model DIRECTORY] [--context 2048] [--steps 32] [--budget 256]

Full attention generates; every variant of LouisKV is watched in `shadow` execution over the same text. Printed are the
tokens that a step would attend to, the share of full attention that they hold, how many of the best tokens are among
them, how often the variant selected, and how many rows (one token of one KV head) it would have moved in a step.
"""

import argparse
import pydoc_data.topics
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvframe
from kvframe.models import fetch_smollm2
from kvframe.report import Report
from kvframe_louis import ClusterUnits


def variants(token_budget: int) -> list[kvframe.Policy]:
    """LouisKV, the same with one slot exchanged each, and the best that a selection of that size can do."""
    louis = kvframe.policy("louiskv", token_budget=token_budget)
    return [
        louis,
        louis.swap(name="every step", trigger=kvframe.EveryStep()),
        louis.swap(name="every 16th step", trigger=kvframe.FixedStride(stride=16)),
        louis.swap(name="once", trigger=kvframe.Once()),
        louis.swap(name="pages", units=kvframe.PageUnits()),
        louis.swap(name="clusters of 8", units=ClusterUnits(cluster_size=8)),
        louis.swap(name="max over the group", scorer=kvframe.MeanKey(group_reduction="max")),
        kvframe.policy("oracle_topk", token_budget=token_budget),
    ]


def table(reports: Sequence[Report]) -> Table:
    """A row for each variant."""
    result = Table()
    for head in ("variant", "attended", "mass held", "of the best", "selects", "rows a step"):
        result.add_column(head, justify="left" if head == "variant" else "right")
    for report in reports:
        result.add_row(
            report.policy["name"],
            f"{report.attended_total:.0f}",
            f"{report.captured_mass:.1%}",
            f"{report.oracle_recall:.1%}",
            f"{report.retrieval_rate:.1%}",
            f"{report.rows_recalled / report.num_decode_steps:,.0f}",
        )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's directory or name; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens to generate")
    parser.add_argument("--budget", type=int, default=256, help="tokens that a selection takes")
    given = parser.parse_args(arguments)

    path = given.model or fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = "\n".join(pydoc_data.topics.topics.values())  # prose that every Python brings
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, : given.context]

    reports = []
    for policy in track(variants(given.budget), "watching", console=Console(stderr=True), transient=True):
        with kvframe.attach(model, policy, execution="shadow") as run:
            model.generate(prompt, max_new_tokens=given.steps, do_sample=False)
        reports.append(run.report())
    Console().print(table(reports))


if __name__ == "__main__":
    main()
