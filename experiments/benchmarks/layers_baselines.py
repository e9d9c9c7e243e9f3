"""The cases of :mod:`experiments.benchmarks.layers_cases` in PyTorch, channels last."""

import functools

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.benchmarks import attributions_baselines
from kdjax import models


def torch_layer(layer: str, shape: tuple[int, ...], kernel: tuple[int, ...], strides: int, padding: str):
    """A call that runs a layer forward and backward in PyTorch."""
    import torch
    from torch.nn import functional as f

    batch, height, width, channels = shape
    last = {"memory_format": torch.channels_last}
    x = torch.randn(batch, channels, height, width).to(**last).requires_grad_()
    pads = torch_pads(height, width, kernel[:2], strides, padding)
    groups = channels if layer in ("depthwise", "between") else 1
    w = (
        None
        if layer == "pool"
        else torch.randn(kernel[3], kernel[2], *kernel[:2]).to(**last).requires_grad_()
    )

    def run():
        x.grad = None
        if w is None:
            y = f.max_pool2d(f.pad(x, pads, value=float("-inf")) if any(pads) else x, kernel, strides)
        else:
            w.grad = None
            y = torch_conv(f.relu6(x) if layer == "between" else x, w, None, strides, pads, groups)
            y = f.relu6(y) if layer == "between" else y
        (y**2).mean().backward()

    return run


def torch_pads(height: int, width: int, window: tuple[int, ...], strides: int, padding: str) -> list[int]:
    """What XLA's padding adds, in the order of ``torch.nn.functional.pad``."""
    rows, columns = jax.lax.padtype_to_pads((height, width), window, (strides, strides), padding)
    return [*columns, *rows]


def torch_conv(x, weight, bias, strides, pads, groups=1):
    """Convolution with XLA's padding: inside the operation where it is even, else added before."""
    from torch.nn import functional as f

    if pads[0] == pads[1] == pads[2] == pads[3]:
        return f.conv2d(x, weight, bias, strides, pads[0], groups=groups)
    return f.conv2d(f.pad(x, pads), weight, bias, strides, groups=groups)


def torch_network(name: str, batch: int, shape: tuple[int, ...], classes: int, trains: bool):
    """A call that takes a step of Adam, or only scores a batch, in PyTorch."""
    import torch
    from torch.nn import functional as f

    params, model_state = models.init(models.build(name, num_classes=classes), shape, seed=0)
    x = torch.randn(batch, shape[2], *shape[:2]).to(memory_format=torch.channels_last)
    y = torch.arange(batch) % classes
    by_hand = {"keras": torch_keras, "malaria": torch_malaria, "digits": torch_digits, "wrn": torch_wide}
    by_hand = by_hand.get(name.partition("_")[0])
    if by_hand is None:
        flat = flatten_dict({"params": params, **model_state}, sep="/")
        network = attributions_baselines.torch_network(
            {path: np.asarray(leaf) for path, leaf in flat.items()}
        )
        forward = network.train(trains).to(memory_format=torch.channels_last)
        leaves = list(forward.parameters())
    else:
        leaves = [torch.nn.Parameter(torch_weight(leaf)) for leaf in jax.tree.leaves(params)]
        weights = jax.tree.unflatten(jax.tree.structure(params), leaves)
        forward = functools.partial(by_hand, weights)
    # on a CPU the fused form of Adam is PyTorch's fastest
    adam = torch.optim.Adam(leaves, 1e-3, fused=True)

    def step():
        adam.zero_grad()
        f.cross_entropy(forward(x), y).backward()
        adam.step()

    def score():
        with torch.no_grad():
            forward(x)

    return step if trains else score


def torch_weight(leaf: jax.Array):
    """A kernel in PyTorch's order of axes, channels last in memory."""
    import torch

    weight = torch.from_numpy(np.array(leaf))
    if leaf.ndim == 4:
        return weight.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    return weight.T.contiguous() if leaf.ndim == 2 else weight


def torch_keras(weights, x):
    """The network of ``kdjax.models.cnn.KerasCnn``."""
    from torch.nn import functional as f

    x = torch_conv(x, weights["Conv_0"]["kernel"], weights["Conv_0"]["bias"], 2, [0, 1, 0, 1])
    x = f.max_pool2d(f.pad(f.leaky_relu(x, 0.2), [0, 1, 0, 1], value=float("-inf")), 2, 1)
    x = torch_conv(x, weights["Conv_1"]["kernel"], weights["Conv_1"]["bias"], 2, [0, 1, 0, 1])
    return f.linear(x.flatten(1), weights["Dense_0"]["kernel"], weights["Dense_0"]["bias"])


def torch_malaria(weights, x):
    """The network of ``kdjax.models.cnn.MalariaCnn``, in training mode."""
    from torch.nn import functional as f

    for layer in ("Conv_0", "Conv_1"):
        x = f.relu(torch_conv(x, weights[layer]["kernel"], weights[layer]["bias"], 1, [0] * 4))
    x = f.dropout(f.max_pool2d(x, 2), 0.1).flatten(1)
    x = f.dropout(f.relu(f.linear(x, weights["Dense_0"]["kernel"], weights["Dense_0"]["bias"])), 0.2)
    return f.linear(x, weights["Dense_1"]["kernel"], weights["Dense_1"]["bias"])


def torch_digits(weights, x):
    """The network of ``kdjax.models.cnn.DigitsCnn``, in training mode."""
    from torch.nn import functional as f

    x = f.relu(torch_conv(x, weights["Conv_0"]["kernel"], weights["Conv_0"]["bias"], 1, [1] * 4))
    x = f.relu(torch_conv(x, weights["Conv_1"]["kernel"], weights["Conv_1"]["bias"], 2, [0, 1, 0, 1]))
    x = f.dropout(x.flatten(1), 0.3)
    return f.linear(x, weights["Dense_0"]["kernel"], weights["Dense_0"]["bias"])


def torch_wide(weights, x):
    """The network of ``kdjax.models.wideresnet.WideResNet``, in training mode; its running statistics are not kept."""
    from torch.nn import functional as f

    def conv(name, x, strides=1):
        kernel = weights[name]["kernel"]
        pads = [0, 1, 0, 1] if strides > 1 else [1] * 4
        return torch_conv(x, kernel, None, strides, pads if kernel.shape[-1] > 1 else [0] * 4)

    def norm(name, x):
        return f.batch_norm(x, None, None, weights[name]["scale"], weights[name]["bias"], training=True)

    x = conv("Conv_0", x)
    before = norm("BatchNorm_0", x)
    for name in sorted(name.removesuffix("_in") for name in weights if name.endswith("_in")):
        y, strides = f.relu(before), 2 if name in ("stage2_block1", "stage3_block1") else 1
        if f"{name}_shortcut" in weights:
            x = conv(f"{name}_shortcut", y, strides)
        y = f.relu(norm(f"{name}_norm", conv(f"{name}_in", y, strides)))
        x = x + conv(f"{name}_out", y)
        before = norm(f"{name}_next_norm", x)
    x = f.relu(before).mean((2, 3))
    return f.linear(x, weights["Dense_0"]["kernel"], weights["Dense_0"]["bias"])
