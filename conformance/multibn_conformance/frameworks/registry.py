"""Every BatchNorm of a framework that the suite knows, with what its dialect states."""

from __future__ import annotations

from .own import KnownDifference, Own

ONE_VALUE = "BN-12-refuses-one-value-*"
HALF_INPUT = ("*float16", "BN-02-half-input")
DOUBLE_INPUT = ("*float64", "BN-13-another-type")
BIASED, UNBIASED = {"moving_variance": "biased"}, {"moving_variance": "unbiased"}
BATCHS_OWN = {"moving_variance": "biased", "momentum": 0.0}
"""Its moving statistics are none that a spec has; with momentum 0 they are the batch's own, and are judged there."""

POISONED = KnownDifference(
    ("BN-11-*-in-training",),
    "moving_(mean|var)",
    "A NaN or an infinity makes the moving statistics of its channel NaN for good.",
)
EMPTY_NAN = KnownDifference(
    ("BN-12-empty-*x*",), "moving_mean must stay as it was: .* is nan", "An empty batch turns the moving statistics NaN."
)
EMPTY_NAN_AT_ONCE = KnownDifference(("BN-12-empty-*",), "is nan|got nan", EMPTY_NAN.reason)
FLUSHED = KnownDifference(("BN-16-denormals",), "moving_mean", "Numbers below the smallest normal one are taken for 0.")
SMALL_NUMBERS = KnownDifference(
    ("BN-10-refuses-int32", "BN-10-refuses-uint8", "BN-10-refuses-bool"),
    "got output",
    "Integers that are no wider than float32, and truth values, are taken.",
)
NUMBERS = KnownDifference(
    ("BN-10-refuses-*",), "got output", "Integers, truth values and float64 beside a float32 state are taken."
)
OTHER_TYPES = KnownDifference(("BN-10-refuses-other-parameters",), "got output", "float64 input is taken with a float32 state.")
HALF_TO_SINGLE = KnownDifference(
    HALF_INPUT, "got type float32, should be float16", "Half input is converted: the output is float32."
)
ONE_PASS = KnownDifference(
    ("BN-01-wide-and-flat", "BN-02-far-from-zero-*", "BN-16-kappa-1e[246]-*", "BN-16-constant-*"),
    "y\\[|moving_var",
    "The variance is E[x^2] - E[x]^2, which loses its digits where the mean is large beside the spread.",
)
IN_SINGLE = KnownDifference(
    DOUBLE_INPUT, "of float64", "float64 input is computed in float32, though the output's type is float64."
)
GLUON = (
    KnownDifference(
        ("BN-01-refuses-*channel*",),
        "got output",
        "The number of channels is not checked: with more than it was built for it reads past the end of its parameters.",
    ),
    KnownDifference(HALF_INPUT, "y\\[", "Half input: products are rounded to float16 on the way, and may overflow there."),
    POISONED,
    KnownDifference(("BN-12-empty-*x*",), "raised MXNetError", "An empty batch is refused: a length of 0 means unknown."),
)
KERAS3 = (HALF_TO_SINGLE, NUMBERS, POISONED, EMPTY_NAN)

ALL: tuple[Own, ...] = (
    Own(
        "torch.nn",
        "torch_nn:make",
        "torch",
        ("torch",),
        "torch",
        UNBIASED,
        ("1-momentum in its type",),
        differences=(
            POISONED,
            KnownDifference(("BN-12-empty-is-no-batch",), "moving_mean", "momentum=None counts an empty batch."),
        ),
    ),
    Own(
        "gluon.nn",
        "gluon_nn:make",
        "mxnet",
        ("mxnet",),
        "gluon",
        BIASED,
        ("momentum",),
        (ONE_VALUE,),
        differences=GLUON,
        from_invstd=True,
    ),
    Own(
        "mx.nd.BatchNorm",
        "mxnet_op:make",
        "mxnet",
        ("mxnet",),
        "mxnet-op",
        BIASED,
        ("momentum",),
        (ONE_VALUE,),
        differences=GLUON,
        from_invstd=True,
    ),
    Own(
        "keras3/jax",
        "keras3:make_jax",
        "jax",
        ("keras", "jax"),
        "keras3",
        BIASED,
        takes=(ONE_VALUE,),
        differences=(*KERAS3, IN_SINGLE),
        by_power=True,
    ),
    Own(
        "keras3/tensorflow",
        "keras3:make_tensorflow",
        "tensorflow",
        ("keras", "tensorflow-cpu"),
        "keras3",
        BIASED,
        takes=(ONE_VALUE,),
        differences=KERAS3,
        by_power=True,
    ),
    Own(
        "keras3/torch",
        "keras3:make_torch",
        "torch",
        ("keras", "torch"),
        "keras3",
        BIASED,
        takes=(ONE_VALUE,),
        differences=(*KERAS3, IN_SINGLE, ONE_PASS),
        by_power=True,
        one_pass=True,
    ),
    Own(
        "keras2",
        "keras2:make",
        "tensorflow",
        ("tf-keras", "tensorflow-cpu"),
        "keras2-fused",
        UNBIASED,
        ("1-momentum",),
        (ONE_VALUE,),
        differences=KERAS3,
        fused=(4, 5),
        by_power=True,
        by_difference=True,
    ),
    Own(
        "tf.fused",
        "tf_fused:make",
        "tensorflow",
        ("tensorflow-cpu",),
        "tf-fused",
        UNBIASED,
        takes=(ONE_VALUE,),
        differences=(
            KnownDifference(DOUBLE_INPUT, "raised InvalidArgumentError: Value for attr '.' of double", "float64 is refused."),
            POISONED,
            EMPTY_NAN,
        ),
    ),
    Own(
        "flax.nnx",
        "flax_nnx:make",
        "jax",
        ("flax", "jax"),
        "flax",
        BIASED,
        takes=(ONE_VALUE,),
        differences=(HALF_TO_SINGLE, NUMBERS, POISONED, EMPTY_NAN, ONE_PASS),
        one_pass=True,
        by_power=True,
    ),
    Own(
        "haiku",
        "haiku_nn:make",
        "jax",
        ("dm-haiku", "jax"),
        None,
        BATCHS_OWN,
        takes=(ONE_VALUE,),
        differences=(HALF_TO_SINGLE, NUMBERS, POISONED, EMPTY_NAN_AT_ONCE, FLUSHED, ONE_PASS),
        one_pass=True,
        by_power=True,
        average="Its moving statistics are an average that has its start at zero divided out.",
    ),
    Own(
        "equinox",
        "equinox_nn:make",
        "jax",
        ("equinox", "jax"),
        None,
        BATCHS_OWN,
        takes=(ONE_VALUE,),
        differences=(
            KnownDifference(
                HALF_INPUT,
                "got type float32, should be float16|raised TypeError",
                "Half input is converted, or refused in training.",
            ),
            SMALL_NUMBERS,
            POISONED,
            EMPTY_NAN_AT_ONCE,
            FLUSHED,
        ),
        average="In training it normalises with its moving average, which begins with the first batch.",
    ),
    Own(
        "equinox/batch",
        "equinox_nn:make_batch",
        "jax",
        ("equinox", "jax"),
        None,
        BIASED,
        takes=(ONE_VALUE,),
        differences=(HALF_TO_SINGLE, SMALL_NUMBERS, POISONED, EMPTY_NAN),
    ),
    Own(
        "onnxruntime",
        "onnx_op:make_runtime",
        "onnx",
        ("onnxruntime", "onnx"),
        "onnx",
        BIASED,
        ("eps", "momentum", "1-momentum"),
        (ONE_VALUE,),
        False,
        (POISONED, EMPTY_NAN),
    ),
    Own(
        "onnx.reference",
        "onnx_op:make_reference",
        "onnx",
        ("onnx",),
        "onnx",
        BIASED,
        ("eps", "momentum", "1-momentum"),
        (ONE_VALUE,),
        False,
        (
            KnownDifference(HALF_INPUT, "y\\[|moving_", "Half input: the statistics are summed in float16."),
            OTHER_TYPES,
            POISONED,
            EMPTY_NAN,
        ),
    ),
    Own(
        "paddle.nn",
        "paddle_nn:make",
        "paddle",
        ("paddlepaddle",),
        "paddle",
        BIASED,
        ("eps", "momentum", "1-momentum"),
        differences=(
            KnownDifference(HALF_INPUT, "raised RuntimeError: .NotFound", "Half input has no kernel on CPU."),
            KnownDifference(
                ("BN-04-scale-no-center", "BN-04-no-scale-center"),
                "got None, should be an array",
                "gamma alone, or beta alone, gets no gradient: only both together do.",
            ),
            POISONED,
            KnownDifference(
                (ONE_VALUE,), "got output", "One value per channel in training: the output is the input, and nothing is updated."
            ),
        ),
    ),
)
"""In the order of reports."""
