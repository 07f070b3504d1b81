"""Quantized layers. In torch they compute with dequantized values; exported graphs hold integers."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.onnx import is_in_onnx_export
from torch.onnx.ops import symbolic
from typing_extensions import Self

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.patch_memory import PatchMemory, distances
from uadtool.lab.quantization.targets import Target

WEIGHT_LIMIT = 127
"""Weights use the codes -127..127: integer kernels require symmetric weights."""

MOST_BIAS = 1 << 30
"""Largest bias, in units of s32; it leaves room for the products of 33,000 input and weight codes."""

QUERY_UNIT, BANK_UNIT, EXTRA = 100, 64, 8
"""Of a ``QuantizedMemory``: the codes of 1 in a query and in a bank, and the components that hold -|c|^2 / 2."""

Layer = nn.Conv2d | nn.Linear
"""A layer whose weights can be quantized, one scale per output channel."""
Quantizable = Layer | PatchMemory


class ActivationQuantizer(nn.Module):
    """Rounds activations to 8 bits, with one scale and zero point per tensor: u8, or s8 with zero point 0.

    ONNX Runtime absorbs a ReLU into the quantizer after it only when the zero point is the lowest code, as it is for a
    u8 range from 0.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, signed: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8 if signed else torch.uint8))

    @classmethod
    def from_range(cls, minimum: float, maximum: float, signed: bool = False) -> Self:
        """The quantizer whose codes span [minimum, maximum], widened to include 0 (padding must be exact).

        A ``signed`` range is symmetric, up to the larger magnitude (Jacob et al. 2018; Wu et al. 2020, section 3.1).
        """
        quantizer = cls(signed)
        minimum, maximum = min(minimum, 0.0), max(maximum, 0.0)
        scale = max(-minimum, maximum) / 127 if signed else (maximum - minimum) / 255
        scale = max(scale, 1e-8)  # the range of a tensor that is always 0 is empty
        quantizer.scale.fill_(scale)
        if not signed:
            quantizer.zero_point.fill_(round(-minimum / scale))
        return quantizer

    def cut_off(self, values: Tensor) -> float:
        """Share of the values that lie outside the range by more than half a code."""
        codes = torch.iinfo(self.zero_point.dtype)
        places = values / self.scale + int(self.zero_point) - (codes.max + codes.min) / 2
        return float((places.abs() > (codes.max - codes.min + 1) / 2).float().mean())

    def forward(self, values: Tensor) -> Tensor:
        codes = torch.iinfo(self.zero_point.dtype)
        if is_in_onnx_export():
            quantized = symbolic("QuantizeLinear", (values, self.scale, self.zero_point), dtype=self.zero_point.dtype,
                                 shape=values.shape, version=1)
            return symbolic("DequantizeLinear", (quantized, self.scale, self.zero_point), dtype=torch.float32,
                            shape=values.shape, version=1)
        # The same as torch.fake_quantize_per_tensor_affine, four times as fast.
        zero_point = int(self.zero_point)
        quantized = (values * self.scale.reciprocal()).round_().clamp_(codes.min - zero_point, codes.max - zero_point)
        return quantized.mul_(self.scale)


class QuantizedLayer(nn.Module):
    """A layer with s8 weights, one scale per output channel, and a float bias."""

    channel_axis: ClassVar[int]
    """Axis of the channels in the output."""
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, layer: Layer) -> None:
        """Quantize the weights of a layer (max-abs range per channel, Krishnamoorthi 2018, section 3.1)."""
        super().__init__()
        weight = layer.weight.detach()
        scale = weight_scale(weight)
        codes = torch.round(weight / _along(scale, weight)).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
        self.register_buffer("weight", codes.to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone())

    def dequantized_weight(self) -> Tensor:
        """The float values of the codes."""
        if is_in_onnx_export():
            return symbolic("DequantizeLinear", (self.weight, self.weight_scale), attrs={"axis": 0},
                            dtype=torch.float32, shape=self.weight.shape, version=1)  # zero points: add_zero_points
        return self.weight.float() * _along(self.weight_scale, self.weight)


class QuantizedLinear(QuantizedLayer):
    channel_axis = -1

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, self.dequantized_weight(), self.bias)


class QuantizedConv2d(QuantizedLayer):
    channel_axis = 1

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise UadtoolError(f"a convolution that pads by {conv.padding!r} with {conv.padding_mode} cannot be "
                               "quantized; pad by numbers, with zeros")
        vertical, horizontal = conv.padding
        self.pads = getattr(conv, "pads", (horizontal, horizontal, vertical, vertical))

    def round_bias(self, input_scale: Tensor) -> None:
        """Round the bias to multiples of the unit of the s32 accumulator: input scale x weight scale.

        Weights of a channel that are all tiny are rounded more coarsely, so that its bias fits s32.
        """
        smallest_scale = self.bias.double().abs() / (input_scale.double() * MOST_BIAS)
        scale = torch.maximum(self.weight_scale, smallest_scale.float())
        codes = torch.round(self.weight * _along(self.weight_scale / scale, self.weight))
        self.weight.copy_(codes)
        self.weight_scale.copy_(scale)
        unit = input_scale.double() * scale.double()
        self.bias.copy_(torch.round(self.bias.double() / unit) * unit)

    def forward(self, values: Tensor) -> Tensor:
        left, right, top, bottom = self.pads
        padding = (top, left)
        if left != right or top != bottom:
            values, padding = F.pad(values, self.pads), (0, 0)
        return F.conv2d(values, self.dequantized_weight(), self.bias, self.stride, padding, self.dilation, self.groups)


class QuantizedMemory(nn.Module):
    """A ``PatchMemory`` with codes of 8 bits for projections, banks and components.

    The projection of a class has a scale for each component, and is multiplied in float. Components and banks have one
    scale for all, since entries are within -1..1: 1 is ``QUERY_UNIT`` codes of a component, which may be a quarter
    greater before it is cut off, and ``BANK_UNIT`` of an entry. A code of the bank cannot hold -|c|^2 / 2, so ``EXTRA``
    components share it: those of a query are 127 each, but the last is 1.

    ONNX Runtime multiplies u8 queries and s8 banks twice as fast as u8 and u8, with the instructions of VNNI. Other x86
    processors add pairs of products in 16 bits, so banks have codes within -64..64, but the last -127..127: no pair
    overflows (255 * 64 + (128 + 1) * 127 < 2**15).

    Args:
        memory: with float tables.
        signed: queries are s8, for OpenVINO, which multiplies in integers only without zero points; otherwise u8 around
            128.
    """

    rows = ("weight", "weight_scale", "bias", "bank")
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    bank: Tensor
    bank_unit: Tensor
    bank_zero_point: Tensor

    def __init__(self, memory: PatchMemory, signed: bool = False) -> None:
        super().__init__()
        self.signed, self.query = signed, ActivationQuantizer(signed)
        self.query.scale.fill_(1 / QUERY_UNIT)
        self.query.zero_point.fill_(0 if signed else 128)
        projection, entries = memory.weight.detach()[:, :, :-1], memory.bank.detach()[:, :-1]
        scale = projection.abs().amax(1, keepdim=True).clamp(min=1e-8) / WEIGHT_LIMIT
        extra = torch.full((EXTRA,), WEIGHT_LIMIT, dtype=torch.float32, device=entries.device)
        extra[-1] = 1
        codes = (entries * BANK_UNIT).round()
        half = (codes.square().sum(1, keepdim=True) * QUERY_UNIT / BANK_UNIT / 2).round()
        self.register_buffer("weight", F.pad(projection / scale, (0, EXTRA)).round().to(torch.int8))
        self.register_buffer("weight_scale", F.pad(scale, (0, EXTRA), value=1.0))
        self.register_buffer("bias", torch.cat([memory.bias.detach()[:, :, :-1],
                                                (extra / QUERY_UNIT).expand(len(scale), 1, EXTRA)], dim=2))
        self.register_buffer("bank", torch.cat([codes, *_shares(-half)], dim=1).to(torch.int8))
        self.register_buffer("bank_unit", torch.tensor(1 / BANK_UNIT))
        self.register_buffer("bank_zero_point", torch.zeros((), dtype=torch.int8))
        self.constant = (WEIGHT_LIMIT**2 * (EXTRA - 1) + 1) / QUERY_UNIT**2

    def dequantized(self) -> PatchMemory:
        """The float memory of these codes."""
        (classes, channels, size), entries = self.weight.shape, self.bank[:, :-EXTRA] / BANK_UNIT
        memory = PatchMemory(classes, channels, size - EXTRA, entries.shape[2])
        with torch.no_grad():
            memory.weight[:, :, :-1].copy_((self.weight * self.weight_scale)[:, :, :-EXTRA])
            memory.bias[:, :, :-1].copy_(self.bias[:, :, :-EXTRA])
            memory.bias[:, :, -1] = 1
            memory.bank.copy_(torch.cat([entries, entries.square().sum(1, keepdim=True) / -2], dim=1))
        return memory

    def forward(self, patches: Tensor, nearest: Tensor) -> Tensor:
        weight, scale, bias, bank = (table.index_select(0, nearest) for table in (
            self.weight, self.weight_scale, self.bias, self.bank))
        z = self.query(patches.flatten(2).transpose(1, 2) @ (weight.float() * scale) + bias)
        products = z @ _dequantize(bank, self.bank_unit, self.bank_zero_point)
        return distances(z, products, self.constant).view(-1, 1, *patches.shape[2:])


class RoundingLayer(nn.Module):
    """Computes with rounded weights, as ``QuantizedLayer`` does, and passes gradients to the float weights."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        weight = self.layer.weight
        scale = weight_scale(weight.detach())
        rounded = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale, dtype=torch.int32), 0,
                                                         -WEIGHT_LIMIT, WEIGHT_LIMIT)
        result: Tensor = functional_call(self.layer, {"weight": rounded}, (values,))
        return result


def quantized_layer(layer: Quantizable, target: Target) -> nn.Module:
    """The layer with quantized weights."""
    if isinstance(layer, PatchMemory):
        return QuantizedMemory(layer, target.signed_queries)
    return QuantizedConv2d(layer) if isinstance(layer, nn.Conv2d) else QuantizedLinear(layer)


def _shares(total: Tensor) -> list[Tensor]:
    """Codes whose products with the extra components of a query add up to the ``total``."""
    shares = []
    for _ in range(EXTRA - 1):
        shares.append((total / WEIGHT_LIMIT).trunc().clamp(-BANK_UNIT, BANK_UNIT))
        total = total - WEIGHT_LIMIT * shares[-1]
    return [*shares, total]


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The values of codes that are chosen at run time."""
    if is_in_onnx_export():
        return symbolic("DequantizeLinear", (codes, scale, zero_point), dtype=torch.float32, shape=codes.shape,
                        version=1)
    return (codes.float() - zero_point) * scale


def weight_scale(weight: Tensor) -> Tensor:
    """The value of one code, for each output channel (the first axis): [C]."""
    return weight.flatten(1).abs().amax(1).clamp(min=1e-8) / WEIGHT_LIMIT


def _along(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.dim() - 1))
