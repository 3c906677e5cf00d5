"""The page about one policy."""

import inspect
from typing import Any

import attrs

from kvframe.cli.fields import field_default, field_notes
from kvframe.composition import Policy
from kvframe.pages import words
from kvframe.pages.markdown import code, published, table
from kvframe.registry import PolicyRecord
from kvframe.traits import traits_of
from kvframe.types import Invariant

# Options that mean the same in every policy that has them.
_COMMON = {"token_budget": "Tokens that a selection takes, for each KV head."}


def policy_page(record: PolicyRecord) -> str:
    """Markdown: where it comes from, what its module tells, composition, traits, options, promises."""
    parts = [
        f"# {record.name}",
        *_paragraphs(inspect.getdoc(record.config_cls) or record.summary)[:1],
        _source(record),
        *_told(record),
        *_composition(record),
        "## Options",
        _options(record.config_cls).strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def _source(record: PolicyRecord) -> str:
    where = ", ".join(
        part for part in (f"*{record.spec.title}*" if record.spec.title else "", published(record)) if part
    )
    found_in = f"Found in `{record.plugin.module}`, from {record.plugin.distribution or 'no distribution'}."
    return f"Published as {where}.\n{found_in}" if where else found_in


def _told(record: PolicyRecord) -> list[str]:
    """The docstring of its module, but for the first line, and for the paper's title, which stands above."""
    title = record.spec.title
    return [part for part in _paragraphs(record.about)[1:] if title is None or title not in " ".join(part.split())]


def _composition(record: PolicyRecord) -> list[str]:
    if record.needs:
        needed = ", ".join(map(code, record.needs))
        return [f"It is made with options that have no default: {needed}."]
    policy = record.make()
    return [
        "## Composition",
        f'```python\nimport kvframe\n\nprint(kvframe.policy("{record.name}"))\n```',
        f"```text\n{policy}\n```",
        "## What it is like",
        _traits(policy).strip(),
        _promises(policy),
    ]


def _traits(policy: Policy) -> str:
    traits = traits_of(policy)
    attended = f"{policy.sink_size} sinks, {policy.selector.capacity} retrieved, {policy.window_size} recent"
    dense = policy.dense_layers
    layers = "all" if dense == "all" else ", ".join(map(str, dense)) or "none"
    return table(
        ("", ""),
        [
            ("attended tokens", "all" if dense == "all" else attended),
            ("dense layers", layers),
            ("what is lost", words.lost(traits)),
            ("what moves while decoding", words.moved(traits)),
            ("what is not retrieved", "enters attention as an estimate" if traits.estimates else "is not attended"),
            ("what stages read besides Q, K and V", ", ".join(traits.reads) or "nothing"),
            ("calibration", words.calibration(traits)),
            ("a step is one CUDA graph", "yes" if traits.capturable else "no"),
        ],
    )


def _options(config_cls: type[Any]) -> str:
    notes = _COMMON | field_notes(Policy) | field_notes(config_cls)
    fields = [field for field in attrs.fields(config_cls) if field.init]
    if not fields:
        return "None."
    return table(
        ("option", "default", "meaning"),
        [
            (
                code(field.alias or field.name),
                "(needed)" if field.default is attrs.NOTHING else code(repr(field_default(field))),
                notes.get(field.name, ""),
            )
            for field in fields
        ],
    )


def _promises(policy: Policy) -> str:
    waived = [invariant for invariant in Invariant if invariant not in policy.promises]
    if not waived:
        return "It keeps every [promise](../policies.md#what-a-policy-promises)."
    listed = "".join(f"\n- {invariant.value}" for invariant in waived)
    return f"Of the [promises](../policies.md#what-a-policy-promises) it does not make these:\n{listed}"
