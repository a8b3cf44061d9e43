"""How much arithmetic a step needs, and how much the device could do."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nemolet.module import NeuralModule

# Dense bf16 tensor-core FLOP/s, from the data sheets.
_PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "V100": 125e12,
}


def flops_per_entry(graph: NeuralModule, batch: dict[str, Tensor]) -> float | None:
    """Floating-point operations of a training step per entry of the first tensor: matrix products, there and back.

    Counted on shapes alone, without arithmetic; the backward pass takes twice the forward pass.

    Returns:
        None where a module cannot run on shapes alone.

    Example:
        >>> import nemolet as nl
        >>> linear = nl.nn.Linear("D", "F", 8, 4)
        >>> flops_per_entry(linear, {"hidden": torch.zeros(2, 3, 8)})
        24.0
    """
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    inputs = {name: torch.empty_like(tensor, device="meta") for name, tensor in batch.items()}
    was_training = graph.training
    # Dynamo would give up on what runs while operations are counted, and never compile it after.
    eager = torch.compiler.set_stance("force_eager")
    try:
        with eager, FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(graph.eval(), on_meta, kwargs=inputs)
    except (NotImplementedError, RuntimeError):  # a module of the user's that looks at values
        return None
    finally:
        graph.train(was_training)
    return 3.0 * float(counter.get_total_flops()) / next(iter(batch.values())).numel()


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a device: from the data sheet of a known GPU, else the best of a few large matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for key, peak in _PEAK.items() if key in name), None)
        if known is not None:
            return known
    size = 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    # On a CPU by the time its cores have worked, so that other programs do not make the machine look slow.
    clock, workers = (time.process_time, torch.get_num_threads()) if device.type == "cpu" else (time.perf_counter, 1)
    best = float("inf")
    for _ in range(4):
        start = clock()
        (left @ right)[0, 0].item()
        best = min(best, clock() - start)
    return 2.0 * size**3 * workers / max(best, 1e-6)
