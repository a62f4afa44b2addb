"""How the gradients of functions depend on the tensors that these save, by the name of the function."""

from __future__ import annotations

from collections.abc import Mapping

LINEAR, NONLINEAR, POSITIVE, INSIDE, SHAPE = "linear", "nonlinear", "positive", "inside", "shape"
"""On a tensor's values, linearly or not; on which of them are positive, or between two bounds; on its shape alone."""

RULES: Mapping[str, str] = {
    **dict.fromkeys(["linear", "bilinear", "conv1d", "conv2d", "conv3d"], LINEAR),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], LINEAR),
    **dict.fromkeys(["matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"], LINEAR),
    **dict.fromkeys(["mul", "mul_", "__mul__", "__rmul__", "multiply", "dropout", "exp"], LINEAR),
    **dict.fromkeys(["batch_norm", "layer_norm", "group_norm", "instance_norm"], LINEAR),
    **dict.fromkeys(["gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "tanh", "sigmoid"], NONLINEAR),
    **dict.fromkeys(["scaled_dot_product_attention", "multi_head_attention_forward"], NONLINEAR),
    **dict.fromkeys(["relu", "relu_", "leaky_relu", "leaky_relu_"], POSITIVE),
    **dict.fromkeys(["relu6", "hardtanh", "hardtanh_"], INSIDE),
    **dict.fromkeys(["max_pool1d", "max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d"], SHAPE),
    **dict.fromkeys(["max_pool2d_with_indices", "adaptive_avg_pool2d", "adaptive_avg_pool3d"], SHAPE),
}
"""Of functions and methods of torch. What others save is kept as it is: some have gradients that are large where what
is saved is small, as division has, and the results of softmax must add up to one."""
