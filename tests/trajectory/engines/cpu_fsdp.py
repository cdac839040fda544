"""Tests only: FSDP on CPU processes under the real Trainer, which accelerate ignores for want of an accelerator."""

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_original = AcceleratorState.__init__


def allow_fsdp_on_cpu():
    """Make AcceleratorState take an FSDP plugin on several CPU processes as it would on several GPUs."""
    AcceleratorState.__init__ = _with_fsdp


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
        return
    if self._mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(self._mixed_precision)
    self.fsdp_plugin = fsdp_plugin
    # FSDP1 compares devices, and "cpu:0" is not "cpu".
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["device"], shared["distributed_type"] = torch.device("cpu"), DistributedType.FSDP
