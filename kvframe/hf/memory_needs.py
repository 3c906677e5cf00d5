"""What a cache takes, held against what there is, before anything is allocated."""

from collections.abc import Sequence

from attrs import frozen

from kvframe.composition import Policy
from kvframe.errors import DeviceMemoryError, HostMemoryError
from kvframe.layer import LayerRuntime
from kvframe.memory.available import available_device_memory, available_host_memory
from kvframe.memory.pinned import pinned_memory
from kvframe.planner.memory import plan_memory
from kvframe.planner.shape import ModelShape
from kvframe.runtime import host_bytes_needed
from kvframe.types import Execution, LayerLayout


@frozen(kw_only=True, eq=False)
class MemoryNeeds:
    """Of the layers of one model that follow a policy."""

    policy: Policy
    execution: Execution
    num_layers: int
    managed: tuple[int, ...]
    """The layers that follow the policy, dense ones included."""

    def check_host(self, layout: LayerLayout, capacity: int, held_by: Sequence[LayerRuntime]) -> None:
        """Raise HostMemoryError if the host cannot hold `capacity` tokens a sequence in layers of this layout.

        held_by: layers whose memory is used again.
        """
        available = available_host_memory()
        if available is None:
            return
        if layout.device.type == "cuda":
            available += pinned_memory().free_bytes
        needed = sum(self._host_bytes(layer_idx, layout, capacity) for layer_idx in self.managed)
        held = sum(
            runtime.host_bytes() + (runtime.device_bytes() if layout.device.type == "cpu" else 0) for runtime in held_by
        )
        if needed > held + available:
            raise HostMemoryError(
                f"the KV of {capacity} tokens x {layout.batch_size} sequences in {len(self.managed)} layers takes "
                f"{needed / 2**30:.2f} GiB of host memory, {available / 2**30:.2f} GiB are available; use a shorter "
                "context (max_new_tokens counts), a smaller batch, or more dense layers on a GPU"
            )

    def check_device(self, layout: LayerLayout, capacity: int, held_by: Sequence[LayerRuntime]) -> None:
        """Raise DeviceMemoryError if a CUDA device cannot hold what the policy keeps there for `capacity` tokens a
        sequence. What a prompt takes on its way is not counted: it depends on how the prompt is cut."""
        if layout.device.type != "cuda" or self.execution != "offload":
            return
        shape = ModelShape(
            num_layers=self.num_layers,
            retrieval_layers=self.managed,
            hidden_size=layout.num_qo_heads * layout.head_dim,
            num_qo_heads=layout.num_qo_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            value_dim=layout.value_dim,
            vocab_size=1,
            dtype=layout.dtype,
            num_parameters=1,
        )
        plan = plan_memory(
            shape, self.policy, context=capacity, max_new_tokens=0, batch_size=layout.batch_size, chunk=capacity
        )
        needed = plan.dense_kv + plan.slots + plan.index + plan.pool_on_gpu
        held = sum(runtime.device_bytes() + runtime.index_bytes() for runtime in held_by)
        available = available_device_memory(layout.device)
        if needed > held + available:
            raise DeviceMemoryError(
                f"the policy keeps {needed / 2**30:.2f} GiB on the device for {capacity} tokens x {layout.batch_size} "
                f"sequences ({plan.dense_kv / 2**30:.2f} GiB of it in dense layers), {available / 2**30:.2f} GiB are "
                "available; use fewer dense layers, a smaller batch or budget, or a shorter context; `kvframe plan` "
                "says what fits"
            )

    def pin(self, layout: LayerLayout, capacity: int) -> None:
        """Lock the host memory of all layers at once: it is slow, and later runs use it again."""
        if layout.device.type == "cuda" and self.execution == "offload":
            num_bytes = self.policy.transfer.host_bytes(layout, capacity)
            num_layers = sum(not self.policy.is_dense(layer_idx) for layer_idx in self.managed)
            if num_bytes and num_layers:
                pinned_memory().reserve(num_bytes, num_layers)

    def _host_bytes(self, layer_idx: int, layout: LayerLayout, capacity: int) -> int:
        if self.execution == "offload" and not self.policy.is_dense(layer_idx):
            return host_bytes_needed(layout, self.policy, capacity)
        if layout.device.type != "cpu":
            return 0
        return layout.batch_size * layout.num_kv_heads * capacity * layout.row_bytes
