import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from torch import nn

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.modules import ActivationQuantizer, QuantizedConv2d, quantized_layer
from uadtool.lab.quantization.targets import TARGETS

BOUNDS = st.floats(-1e3, 1e3, width=32)


# Activations


@pytest.fixture(scope="module")
def reference():
    """QuantizeLinear and DequantizeLinear in ONNX Runtime: values, scale, zero point -> values."""
    types, info, node = onnx.TensorProto, onnx.helper.make_tensor_value_info, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [node("QuantizeLinear", ["values", "scale", "zero_point"], ["codes"]),
         node("DequantizeLinear", ["codes", "scale", "zero_point"], ["result"])], "reference",
        [info("values", types.FLOAT, ["N"]), info("scale", types.FLOAT, []), info("zero_point", types.UINT8, [])],
        [info("result", types.FLOAT, ["N"])])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda quantizer, values: session.run(None, {
        "values": values, "scale": quantizer.scale.numpy(), "zero_point": quantizer.zero_point.numpy()})[0]


@given(bounds=st.tuples(BOUNDS, BOUNDS).map(sorted), shares=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=20))
def test_activations_are_rounded_as_onnx_rounds_them(reference, bounds, shares):
    low, high = min(bounds[0], 0), max(bounds[1], 0)
    quantizer = ActivationQuantizer.from_range(*bounds)
    values = np.array([low + share * (high - low) for share in shares], np.float32)
    scale = quantizer.scale.item()
    ties = np.abs(np.mod(values.astype(np.float64) / scale, 1) - 0.5) < 1e-3  # either neighbour will do
    found = quantizer(torch.from_numpy(values)).numpy()
    expected = reference(quantizer, values)
    np.testing.assert_allclose(found[~ties], expected[~ties], rtol=1e-6)
    np.testing.assert_allclose(found[ties], expected[ties], atol=scale * 1.001)


@given(st.tuples(BOUNDS, BOUNDS).map(sorted), st.floats(0, 1))
def test_the_codes_span_the_range_and_hold_zero(bounds, share):
    quantizer = ActivationQuantizer.from_range(*bounds)
    low, high = min(bounds[0], 0), max(bounds[1], 0)
    scale = quantizer.scale.item()
    inside = low + share * (high - low)
    values = quantizer(torch.tensor([0.0, low, high, inside, -1e9, 1e9]))
    assert values[0] == 0  # padding stays exact
    tolerance = scale * (1 + 1e-4)  # half a code, and another half for the zero point
    np.testing.assert_allclose(values[1:4], [low, high, inside], atol=tolerance)
    assert values[5] - values[4] == pytest.approx(255 * scale, rel=1e-5)
    if low == 0:
        assert quantizer.zero_point == 0  # the lowest code, so that a ReLU can be absorbed


@given(st.tuples(BOUNDS, BOUNDS).map(sorted))
def test_the_larger_magnitude_limits_a_symmetric_range(bounds):
    quantizer = ActivationQuantizer.from_range(*bounds, signed=True)
    longer = max(-bounds[0], bounds[1], 0)
    values = quantizer(torch.tensor([0.0, longer, -longer, bounds[0], bounds[1]]))
    np.testing.assert_allclose(values, [0, longer, -longer, *np.minimum(bounds, longer).clip(-longer)],
                               atol=quantizer.scale.item() * 0.51)


# Weights


@given(weights=stn.arrays(np.float32, (4, 2, 3, 3), elements=st.floats(-100, 100, width=32)))
def test_weights_are_rounded_per_channel(weights):
    conv = nn.Conv2d(2, 4, 3)
    conv.weight.data = torch.from_numpy(weights)
    quantized = QuantizedConv2d(conv)
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight.abs().max() <= 127
    scale = np.maximum(np.abs(weights).max((1, 2, 3)), 1e-8) / 127
    np.testing.assert_allclose(quantized.weight_scale, scale, rtol=1e-6)
    unit = quantized.weight_scale.double().view(-1, 1, 1, 1)
    assert ((quantized.weight * unit - torch.from_numpy(weights)).abs() <= unit / 2 * (1 + 1e-4)).all()


@given(stn.arrays(np.float32, 4, elements=st.floats(-10, 10, width=32)), st.floats(2 ** -10, 1, width=32))
def test_biases_are_whole_numbers_of_their_unit(biases, input_scale):
    conv = nn.Conv2d(2, 4, 3)
    conv.bias.data = torch.from_numpy(biases)
    quantized = QuantizedConv2d(conv)
    quantized.round_bias(torch.tensor(input_scale))
    unit = quantized.weight_scale.double().numpy() * input_scale
    codes = quantized.bias.double().numpy() / unit
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3 + 1e-6 * np.abs(codes).max())
    np.testing.assert_allclose(quantized.bias, biases, atol=unit.max() / 2 * 1.001, rtol=1e-6)


def test_a_channel_without_weights_keeps_its_bias():
    conv = nn.Conv2d(2, 4, 3)
    conv.weight.data[1] *= 1e-12
    conv.weight.data[2] *= 1e-4
    conv.bias.data = torch.tensor([0.5, -5.0, 3.0, 0.25])
    quantized, before = QuantizedConv2d(conv), QuantizedConv2d(conv)
    quantized.round_bias(torch.tensor(1e-3))
    torch.testing.assert_close(quantized.bias, conv.bias.data, rtol=1e-6, atol=1e-4)
    codes = quantized.bias.double() / (1e-3 * quantized.weight_scale.double())
    assert (codes.abs() <= 2 ** 30 + 1000).all()
    others = [0, 3]
    assert torch.equal(quantized.weight[others], before.weight[others])
    assert torch.equal(quantized.weight_scale[others], before.weight_scale[others])


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_padding_that_integer_kernels_lack_is_refused(options):
    with pytest.raises(UadtoolError, match="pad by numbers, with zeros"):
        quantized_layer(nn.Conv2d(4, 8, 3, **options), TARGETS["onnxruntime"])


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4, bias=False),
    nn.Conv2d(4, 8, 3, dilation=2), nn.Linear(12, 7), nn.Linear(12, 5, bias=False),
])
def test_a_quantized_layer_computes_what_the_float_layer_does(layer):
    torch.manual_seed(0)
    values = torch.randn(2, 4, 16, 12)
    with torch.inference_mode():
        expected, found = layer(values), quantized_layer(layer, TARGETS["onnxruntime"])(values)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
