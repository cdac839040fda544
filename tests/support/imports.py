"""What most ranks import, once, in the server that forks them; nothing here may read the environment of one rank."""

import gc
import importlib.util

import peft  # noqa: F401
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401

import safemerge_callback.training.callback  # noqa: F401
import tests.support.world  # noqa: F401

if importlib.util.find_spec("deepspeed"):
    import deepspeed  # noqa: F401

# Not walked over again by any fork, before and after each training.
gc.collect()
gc.freeze()
