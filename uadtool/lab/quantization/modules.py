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

WEIGHT_LIMIT = 127
"""Weights use the codes -127..127: integer kernels require symmetric weights."""

MOST_BIAS = 1 << 30
"""Largest bias, in units of s32; it leaves room for the products of 33,000 input and weight codes."""

UNIT, CENTRE, EXTRA = 100, 128, 16
"""Of a ``QuantizedMemory``: the code of 1, the zero point, and the components that hold -|c|^2 / 2."""

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

    The projection of a class has a scale for each component. Components and banks have one scale for all, since entries
    are within -1..1: 1 is ``UNIT`` codes, and a component may be a quarter greater before it is cut off. A code of the
    bank cannot hold -|c|^2 / 2, so ``EXTRA`` components share it: those of a query are 127 each, but the last is 1.

    Codes are u8 around 128, in which the integer kernels of ONNX Runtime are exact on every processor.
    """

    weight: Tensor
    weight_unit: Tensor
    weight_scale: Tensor
    bias: Tensor
    bank: Tensor

    def __init__(self, memory: PatchMemory) -> None:
        super().__init__()
        projection, entries = memory.weight.detach()[:, :, :-1], memory.bank.detach()[:, :-1]
        scale = projection.abs().amax(1, keepdim=True).clamp(min=1e-8) / WEIGHT_LIMIT
        extra = torch.full((EXTRA,), WEIGHT_LIMIT, dtype=torch.float32, device=entries.device)
        extra[-1] = 1
        codes = (entries * UNIT).round()
        half = (codes.square().sum(1, keepdim=True) / 2).round()
        self.register_buffer("weight", _centred(F.pad(projection / scale, (0, EXTRA))))
        self.register_buffer("weight_unit", torch.ones(()))
        self.register_buffer("weight_scale", F.pad(scale, (0, EXTRA), value=1.0))
        self.register_buffer("bias", torch.cat([memory.bias.detach()[:, :, :-1],
                                                (extra / UNIT).expand(len(scale), 1, EXTRA)], dim=2))
        self.register_buffer("bank", _centred(torch.cat([codes, *_shares(-half)], dim=1)))
        self.query = ActivationQuantizer()
        self.query.scale.fill_(1 / UNIT)
        self.query.zero_point.fill_(CENTRE)
        self.constant = (WEIGHT_LIMIT**2 * (EXTRA - 1) + 1) / UNIT**2

    def forward(self, patches: Tensor, nearest: Tensor) -> Tensor:
        projection = _dequantize(self.weight[nearest], self.weight_unit, self.query.zero_point)
        z = patches.flatten(2).transpose(1, 2) @ projection * self.weight_scale[nearest] + self.bias[nearest]
        z = self.query(z)
        products = z @ _dequantize(self.bank[nearest], self.query.scale, self.query.zero_point)
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


def quantized_layer(layer: Quantizable) -> nn.Module:
    """The layer with quantized weights."""
    if isinstance(layer, PatchMemory):
        return QuantizedMemory(layer)
    return QuantizedConv2d(layer) if isinstance(layer, nn.Conv2d) else QuantizedLinear(layer)


def _centred(codes: Tensor) -> Tensor:
    """Signed codes as u8 around 128."""
    return (codes.round().clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT) + CENTRE).to(torch.uint8)


def _shares(total: Tensor) -> list[Tensor]:
    """Codes whose products with the extra components of a query add up to the ``total``."""
    shares = []
    for _ in range(EXTRA - 1):
        shares.append((total / WEIGHT_LIMIT).trunc().clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT))
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
