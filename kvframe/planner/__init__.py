"""Does a model, a context and a policy fit a device, and how fast will it be? Plain functions of numbers."""

from kvframe.planner.device import Device, measure_device
from kvframe.planner.memory import MemoryPlan, plan_memory
from kvframe.planner.plan import Plan, plan
from kvframe.planner.shape import ModelShape
from kvframe.planner.speed import SpeedPlan, plan_speed

__all__ = [
    "Device",
    "MemoryPlan",
    "ModelShape",
    "Plan",
    "SpeedPlan",
    "measure_device",
    "plan",
    "plan_memory",
    "plan_speed",
]
