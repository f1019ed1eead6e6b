"""A frozen backbone in 4 or 8 bits: its linear layers, by bitsandbytes; what learns beside them stays float32.

4 bits are NF4 with its scales quantised again, as QLoRA has it (Dettmers et al. 2023, arXiv 2305.14314); 8 bits are
LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), which rounds what goes into a layer too.
"""

from __future__ import annotations

import ctypes
import platform
from collections import Counter
from typing import Any

import torch
from torch import nn

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.learning.task import Held

QUANTISED = (4, 8)
# LLM.int8() computes columns whose inputs are beyond 6 apart, in half precision; 0: none. With them the perplexity of
# SmolLM2-135M was the same to half a percent, and an evaluation in bfloat16 took 1.3 GB more.
OUTLIERS = 0.0


def _library(bits: int) -> Any:
    """The library bitsandbytes.

    Raises:
        SettingsError: it is not installed, or has nothing for this machine.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise SettingsError(
            f"backbone-bits = {bits}: needs bitsandbytes: pip install 'fedgen-edge[bits]' ({error}); or use 0"
        ) from None
    return bitsandbytes


def placed(model: nn.Module, held: Held) -> nn.Module:
    """The model where and as it is to be held.

    Raises:
        SettingsError: ``held.bits`` is asked for and the library for it is not there.
        BackboneError: the model has no linear layer that can be held in so few bits.
    """
    if not held.bits:
        return model.to(held.device)
    library = _library(held.bits)
    for name in _taken(model, held.bits):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _layer(library, model.get_submodule(name), held))
    for parameter in model.parameters():
        if _bits_of(parameter) == 0:  # as a copy, so that nothing holds on to the whole file any more
            parameter.data = parameter.data.to(held.device, held.dtype, copy=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(held.device))
    setattr(model, f"is_loaded_in_{held.bits}bit", True)  # by which PEFT knows which adapter such layers take
    _give_back()
    return model


def _give_back() -> None:
    """Let the system have what rounding took for a moment; glibc would keep it, and that can be more than the model."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _taken(model: nn.Module, bits: int) -> list[str]:
    """Names of the layers that are held in fewer bits.

    Raises:
        BackboneError: there is none.
    """
    kept = _kept(model)
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer not in kept]
    if not names:
        raise BackboneError(
            f"backbone-bits = {bits}: {type(model).__name__} has no linear layer that can be held in so few; use 0"
        )
    return names


def _kept(model: nn.Module) -> set[nn.Module]:
    """Linear layers that stay as they are: the one that makes the output, and those whose weight others have too."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {layer for layer in model.modules() if type(layer) is nn.Linear and uses[id(layer.weight)] > 1}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return tied | ({output} if output is not None else set())


def _layer(library: Any, layer: Any, held: Held) -> nn.Module:
    """A linear layer in 4 or 8 bits; the library rounds the weight when it is moved to its place."""
    inputs, outputs, biased = layer.in_features, layer.out_features, layer.bias is not None
    if held.bits == 4:
        made = library.nn.Linear4bit(inputs, outputs, biased, compute_dtype=held.dtype, quant_type="nf4", device="meta")
        made.weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        # Else it lays weights out anew when first evaluated, for some CPUs alone, with scales rounded to bfloat16: the
        # model would not be the same before and after. Nor does that take every width.
        made.support_avx512bf16_for_cpu = False
    else:
        made = library.nn.Linear8bitLt(inputs, outputs, biased, False, threshold=OUTLIERS, device="meta")
        made.weight = library.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    if biased:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    rounded: nn.Module = made.to(held.device)
    return rounded


def _bits_of(parameter: nn.Parameter) -> int:
    """4 or 8 where it is held in so few, else 0."""
    return {torch.uint8: 4, torch.int8: 8}.get(parameter.dtype, 0)


def count(model: nn.Module) -> int:
    """Numbers in the model's weights, tied ones once; two of 4 bits lie in one byte."""
    return sum(p.numel() * (2 if _bits_of(p) == 4 else 1) for p in model.parameters())


def held_bytes(model: nn.Module) -> int:
    """Bytes that the weights take, tied ones once, with the scales of what is held in fewer bits."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            total += sum(scale.numel() * scale.element_size() for scale in scales)
        if (rows := getattr(parameter, "SCB", None)) is not None:
            total += rows.numel() * rows.element_size()
    return total


def expected_bytes(model: nn.Module, held: Held) -> int:
    """What ``held_bytes`` will be of a model that is not held yet: float32 scales of rows, or of 64 numbers each.

    Those of 64 are held in 8 bits themselves, with a float32 for 256 of them.
    """
    total = sum(parameter.numel() for parameter in model.parameters()) * held.dtype.itemsize
    for name in _taken(model, held.bits) if held.bits else ():
        layer: Any = model.get_submodule(name)
        numbers = layer.weight.numel()
        blocks = -(-numbers // 64)
        scales = 4 * layer.out_features if held.bits == 8 else blocks + 4 * -(-blocks // 256)
        total += numbers * held.bits // 8 + scales - numbers * held.dtype.itemsize
    return total
