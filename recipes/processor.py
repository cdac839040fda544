"""What the machine's processor can do: which instructions results round by, and whether bfloat16 is quick."""

from __future__ import annotations


def vector_instructions() -> str:
    """Return the vector instructions that torch uses here, such as AVX2: with others, results round otherwise."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def fast_bfloat16() -> bool:
    """Whether bfloat16 is quicker than float32 here: an accelerator, or a CPU with instructions for it."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    cpu = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.accelerator.is_available() or bool(cpu)
