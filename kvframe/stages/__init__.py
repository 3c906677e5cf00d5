"""The five slots: one abstract class each, and the trivial members."""

from kvframe.stages.around import SelectorAround
from kvframe.stages.base import SLOTS, Slot, Stage
from kvframe.stages.clusters import ClusterUnits
from kvframe.stages.drop import Drop
from kvframe.stages.estimate import EstimateRest
from kvframe.stages.missed import MissedShare
from kvframe.stages.quantized import QuantizedHostPool
from kvframe.stages.regrouped import RegroupedUnits
from kvframe.stages.rerank import SketchRerank
from kvframe.stages.scorer import MeanKey, Scorer
from kvframe.stages.selector import SelectNothing, Selector, TopBudget, TopBytes
from kvframe.stages.transfer import HostPool, KeepOnDevice, Transfer
from kvframe.stages.trigger import EveryStep, FixedStride, Never, Once, Trigger
from kvframe.stages.units import DecoupledUnits, PageUnits, TokenUnits, UnitBuilder

__all__ = [
    "SLOTS",
    "ClusterUnits",
    "DecoupledUnits",
    "Drop",
    "EstimateRest",
    "EveryStep",
    "FixedStride",
    "HostPool",
    "KeepOnDevice",
    "MeanKey",
    "MissedShare",
    "Never",
    "Once",
    "PageUnits",
    "QuantizedHostPool",
    "RegroupedUnits",
    "Scorer",
    "SelectNothing",
    "Selector",
    "SelectorAround",
    "SketchRerank",
    "Slot",
    "Stage",
    "TokenUnits",
    "TopBudget",
    "TopBytes",
    "Transfer",
    "Trigger",
    "UnitBuilder",
]
