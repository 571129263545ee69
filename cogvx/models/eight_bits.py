"""Weights of fully connected layers in 8 bits, int8 or fp8, with a scale for each row.

They take half the memory of 16 bits. A weight is widened where its layer is called, and the product is computed in the
dtype of the tokens: that runs on every device, saves memory and no time. Products in fp8 are asked for apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels import fp8_linear, linear

from .linear import Linear

FORMS = ("int8", "fp8")
FP8 = torch.float8_e4m3fn
LARGEST = {"int8": 127.0, "fp8": torch.finfo(FP8).max}
BLOCKS = ("transformer_blocks.", "encoder.block.")  # of the transformer, of the T5 encoder


class EightBitLinear(nn.Linear):
    """A fully connected layer [..., D] -> [..., K] whose weight is `weight * scale`, a scale a row.

    form: "int8", whole numbers from -127 to 127; or "fp8", e4m3, as its bytes, so that no cast of a model widens them.
    """

    products: str | None = None  # "fp8" has them taken in fp8, of the numbers of the weight as they are

    def __init__(self, layer: nn.Linear, form: str, device: torch.device | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.form, self.for_tokens = form, isinstance(layer, Linear)
        self.dtype = getattr(layer, "computed_in", layer.weight.dtype)
        weight, scale = in_eight_bits(layer.weight.detach().to(device), form)
        self.weight = nn.Parameter(weight.to(layer.weight.device), requires_grad=False)
        self.register_parameter("bias", layer.bias)
        self.register_buffer("scale", scale.to(layer.weight.device))

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.products == "fp8":
            return fp8_linear(x.to(dtype), self.weight.view(FP8), self.scale, bias, gelu)
        weight = widened_weight(self, dtype)
        if self.for_tokens:
            return linear(x.to(dtype), weight, bias, gelu)
        return F.linear(x.to(dtype), weight, bias)


def in_eight_bits(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:  # [K, D] -> [K, D] of int8, [K, 1]
    """The nearest numbers of 8 bits, and scales in the weight's own dtype that take the largest of a row to LARGEST."""
    most = LARGEST[form]
    scale = (weight.abs().amax(1, keepdim=True).float() / most).to(weight.dtype)
    scale = scale.clamp(min=torch.finfo(weight.dtype).tiny)
    # By the scale as it is kept, so that its own rounding costs nothing.
    scaled = (weight.float() / scale.float()).clamp(-most, most)
    return scaled.round().to(torch.int8) if form == "int8" else scaled.to(FP8).view(torch.int8), scale


def widened_weight(layer: EightBitLinear, dtype: torch.dtype) -> Tensor:  # [K, D]
    """The weight that a layer computes with."""
    numbers = layer.weight if layer.form == "int8" else layer.weight.view(FP8)
    return numbers.to(dtype).mul_(layer.scale.to(dtype))


def to_eight_bits(model: nn.Module, form: str, device: torch.device | None = None) -> None:
    """Keep the weights of the fully connected layers in a model's blocks in 8 bits, each rounded on the device.

    LoRAs stay beside layers whose weights are in 8 bits already; they are loaded after this, not before.

    Raises ValueError for a form that there is not, and for layers with LoRAs beside weights that are not in 8 bits.
    """
    if form not in FORMS:
        raise ValueError(f"weights is {form!r}; valid: {', '.join(map(repr, FORMS))}")
    for name, module in list(model.named_modules()):
        if name.startswith(BLOCKS) and isinstance(module, nn.Linear) and not hasattr(module, "form"):
            if hasattr(module, "original"):
                raise ValueError(f"a LoRA is loaded beside {name}; load it after the weights are in 8 bits")
            model.set_submodule(name, EightBitLinear(module, form, device).train(module.training))


def multiply_in_fp8(model: nn.Module) -> None:
    """Have the fully connected layers that tokens pass in a transformer's blocks take their products in fp8.

    The first and the last layer and what modulates compute as before, and so do LoRAs, beside them. Weights that are
    in fp8 already are multiplied as they are; others are rounded at each call.

    Raises ValueError for weights in other forms of few bits, which would be rounded twice.
    """
    for name, module in model.named_modules():
        for_tokens = getattr(module, "for_tokens", isinstance(module, Linear))
        if not name.startswith(BLOCKS[0]) or not for_tokens:
            continue
        form = getattr(module, "form", "fp8") if type(module.weight) in (nn.Parameter, Tensor) else "another form"
        if form != "fp8":
            raise ValueError(f"products in fp8: {name} has its weight in {form}, which would be rounded twice")
        module.products = "fp8"


def refuse_to_save(model: nn.Module) -> None:
    """Raises ValueError for a model with weights in 8 bits."""
    forms = {module.form for module in model.modules() if hasattr(module, "form")}
    if forms:
        raise ValueError(f"weights are in {', '.join(forms)}, which no checkpoint holds; load them as stored to save")
