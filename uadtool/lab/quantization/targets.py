"""What runtimes require of a quantized graph."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A flavour of quantized graph.

    Args:
        signed: activations are s8 with zero point 0; otherwise u8 with a zero point.
        quantized_outputs: outputs of integer kernels are quantized even where only float operations read them.
        integer_bias: biases are s32, in units of input scale x weight scale; otherwise float.
        half: operations of the networks that stay float compute in fp16.
        signed_queries: what is looked up in memories is s8; otherwise u8 around 128.
    """

    name: str
    signed: bool
    quantized_outputs: bool
    integer_bias: bool
    half: bool
    signed_queries: bool = False


TARGETS = {target.name: target for target in (
    # Fuses Q/DQ with a convolution to QLinearConv only when the output is also quantized, and absorbs a ReLU only when
    # the zero point is the lowest code (u8 after ReLU): onnxruntime pull request 11696.
    Target("onnxruntime", signed=False, quantized_outputs=True, integer_bias=True, half=False),
    # Supports both other flavours; this one rounds least.
    Target("openvino", signed=False, quantized_outputs=False, integer_bias=False, half=False, signed_queries=True),
    # Developer guide, "Working with quantized types" (explicit quantization). TensorRT 11 takes fp16 only from the
    # graph. TensorRT 8 takes no s8 constants; the builder of engines gives it floats (``with_float_weights``).
    Target("tensorrt", signed=True, quantized_outputs=False, integer_bias=False, half=True),
)}
