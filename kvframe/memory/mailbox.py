"""A few numbers from the device, read by the host without waiting for whatever else is queued."""

import time
from typing import Any

import torch
from torch import Tensor

from kvframe.memory.link import link_of


class DeviceReport:
    """Asked for while the device is busy, answered later."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked: tuple[Tensor, Any] | None = None

    def ask(self, numbers: Tensor) -> None:
        """Let the device write down what `numbers`, int64 [n], are at this point of its work."""
        if self._device.type != "cuda":
            self._asked = (numbers.clone(), None)
            return
        answer = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        # A copy, because nobody may write to what is on its way.
        self._asked = (answer, link_of(self._device).send_aside(numbers.clone(), answer))

    def answer(self) -> list[int]:
        """What they were; the host waits until the device has come that far."""
        assert self._asked is not None, "nothing was asked for"
        numbers, event = self._asked
        while event is not None and not event.query():
            time.sleep(0)  # mostly it is long there: whoever generates has looked at the prompt's last token by now
        found: list[int] = numbers.tolist()
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceReport":
        # An event cannot be copied; what it stands for is waited for instead.
        twin = DeviceReport(self._device)
        if self._asked is not None:
            twin._asked = (torch.tensor(self.answer()), None)
        return twin
