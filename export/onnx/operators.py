"""Operators and types that TensorRT's parser takes, and the limits of single operators.

Source: docs/operators.md of onnx/onnx-tensorrt, and its importer for Clip (integers too).
"""

from __future__ import annotations

from earlytom.dtypes import DTYPES

FLOATS = frozenset(dtype.onnx for dtype in DTYPES.values())
HALVES = FLOATS - {"FLOAT"}
NUMBERS = FLOATS | {"INT32", "INT64"}
ANY = NUMBERS | {"BOOL"}

# Operator -> types of its data. Control flow, sequences, quantisation, random numbers and operators whose output shape
# depends on data (NonZero, Unique, Compress) are left out on purpose, also where the parser would take them.
OPERATORS: dict[str, frozenset[str]] = {
    name: types
    for types, names in (
        (FLOATS, "Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Conv "
         "ConvTranspose Cos Cosh CumSum Einsum Elu Erf Exp Floor Gelu Gemm GlobalAveragePool GlobalLpPool "
         "GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf "
         "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool "
         "MeanVarianceNormalization Mish PRelu Pow Reciprocal Resize Round Selu Sigmoid Sin Sinh Softmax "
         "Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"),
        (NUMBERS, "Abs Add ArgMax ArgMin Clip DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max "
         "Mean Min Mod Mul Neg Pad ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
         "ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"),
        (ANY, "CastLike Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity "
         "OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where"),
        (ANY | {"UINT8"}, "Cast"),
        (frozenset({"BOOL"}), "And Not Or Xor"),
    )
    for name in names.split()
}
DATA_INPUT = {"Where": 1}  # which input's type counts, where it is not the first

# Inputs that TensorRT or a static shape needs as constants; Reduce* are added in `_arguments`.
CONSTANT_INPUTS = {"Squeeze": (1,), "Unsqueeze": (1,), "Slice": (1, 2, 3, 4), "Pad": (1, 3), "CumSum": (1,),
                   "TopK": (1,), "Reshape": (1,), "Expand": (1,), "Tile": (1,), "Resize": (1, 2, 3), "OneHot": (1,),
                   "Split": (1,), "Trilu": (1,), "ConstantOfShape": (0,)}
TOPK_LIMIT = 3840
# Sums over many values, and everything that decides a choice: float32 however the weights are stored.
FLOAT32_OPERATORS = frozenset({
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization", "Softmax", "LogSoftmax",
    "Exp", "CumSum", "TopK", "ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
})
WEIGHTED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


RESIZE = (
    ("mode", "nearest", ("nearest", "linear")),
    ("coordinate_transformation_mode", "half_pixel",
     ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")),
    ("nearest_mode", "round_prefer_floor", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    ("keep_aspect_ratio_policy", "stretch", ("stretch",)),
    ("antialias", 0, (0,)),
)
