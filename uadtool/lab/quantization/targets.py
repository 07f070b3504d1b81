"""What runtimes ask of a quantized graph."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A flavour of quantized graph.

    Args:
        signed: activations are s8 with zero point 0, else u8 with a zero point.
        quantized_outputs: what an integer kernel writes is quantized even where only float operations read it.
        integer_bias: a bias is s32, in units of input scale x weight scale, else float.
        weight_quantizers: weights are stored in float before a quantizer of their own, else as s8.
        half: what stays float in the networks is fp16.
    """

    name: str
    signed: bool
    quantized_outputs: bool
    integer_bias: bool
    weight_quantizers: bool
    half: bool


TARGETS = {target.name: target for target in (
    # Fuses Q/DQ with a convolution to QLinearConv only when its output is quantized too, and absorbs a ReLU only when
    # the zero point is the lowest code (u8 after ReLU): onnxruntime pull request 11696.
    Target("onnxruntime", signed=False, quantized_outputs=True, integer_bias=True, weight_quantizers=False,
           half=False),
    # Takes both of the others' flavours; so the one that rounds least.
    Target("openvino", signed=False, quantized_outputs=False, integer_bias=False, weight_quantizers=False,
           half=False),
    # Developer guide, "Working with quantized types" (explicit quantization); TensorRT 8 wants Q before the DQ of
    # weights, 11 takes fp16 from the graph alone.
    Target("tensorrt", signed=True, quantized_outputs=False, integer_bias=False, weight_quantizers=True,
           half=True),
)}
