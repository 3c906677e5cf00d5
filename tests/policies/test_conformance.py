"""Every registered policy, and every stage that none of them has, through the conformance kit."""

import pytest
from helpers import policy_records, record_id
from hypothesis import settings

from kvframe.registry import PolicyRecord, StageRecord, default_registry
from kvframe.stages import SLOTS, Stage
from kvframe.testing import check_policy, check_stage
from kvframe.testing.small import small_policy, small_stages


def num_examples() -> int:
    """Few of each promise in the suite; as many as the profile says where it is a thorough one."""
    return max(2, settings().max_examples // 15)


@pytest.mark.parametrize("record", policy_records(), ids=record_id)
def test_policy(record: PolicyRecord):
    """It keeps what it promises, the same in both executions, and each of its stages works in LouisKV or is refused."""
    check_policy(record.name, max_examples=num_examples())


def other_stages() -> list[Stage]:
    """Registered stages that are in no registered policy as it is by default."""
    policies = [small_policy(record) for record in policy_records()]
    seen = {type(part) for policy in policies for slot in SLOTS for part in policy.stage(slot).with_parts()}
    return [stage for slot in SLOTS for stage in small_stages(slot) if type(stage) not in seen]


@pytest.mark.parametrize("stage", other_stages(), ids=lambda stage: f"{stage.slot}-{stage.name}")
def test_stage(stage: Stage):
    """So do policies with a stage that nobody has by default."""
    check_stage(type(stage), max_examples=num_examples())


def test_every_stage_is_checked():
    """In a policy, or on its own."""
    policies = [small_policy(record) for record in policy_records()]
    in_policies = {type(part) for policy in policies for slot in SLOTS for part in policy.stage(slot).with_parts()}
    records: tuple[StageRecord, ...] = default_registry().stages()

    assert {record.stage for record in records} <= in_policies | {type(stage) for stage in other_stages()}
