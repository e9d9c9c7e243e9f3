"""Writes mobilenet_v2.npz: what torchvision's MobileNetV2 computes from numbers that a formula gives.

Needs torch and torchvision (made with 2.13.0 and 0.28.0): ``python tests/goldens/mobilenet_v2.py``. The weights are not
stored: the test draws the same ones with :func:`draw`.
"""

import hashlib
from pathlib import Path

import numpy as np


def draw(name, shape):
    """The array of a name: "images", or one of torchvision's ``state_dict``. Raw bits are the same in every NumPy."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(int(np.prod(shape))) >> np.uint64(11)
    uniform = (raw * 2.0**-53).reshape(shape)
    if len(shape) > 1 and name != "images":
        values = (2 * uniform - 1) * np.sqrt(6 / np.prod(shape[1:]))  # variance 2 / fan-in
    elif name.endswith(("var", "weight")):
        values = 0.5 + uniform  # of a batch normalisation
    else:
        values = 2 * uniform - 1
    return values.astype(np.float32)


def main():
    import torch

    # The compiled operators of a torchvision for CUDA do not load beside a torch for CPUs. None is called here, but
    # the import looks for these two.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision.models import MobileNetV2

    rows = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    images = torch.from_numpy(draw("images", (2, 3, 16, 16)))
    stored = {}
    for removed in (0, 5):
        net = MobileNetV2(num_classes=10, width_mult=0.25, inverted_residual_setting=rows).eval()
        net.features[0][0].stride = (1, 1)
        net.features = net.features[: 19 - removed]
        if removed:
            net.classifier[1] = torch.nn.Linear(net.features[-1].out_channels, 10)
        net.load_state_dict(
            {
                name: torch.from_numpy(draw(name, tuple(x.shape))) if x.ndim else x
                for name, x in net.state_dict().items()
            }
        )
        x = images
        with torch.no_grad():
            for piece, module in enumerate(net.features):
                x = module(x)
                if piece in (0, 3, 6, 13, 17):  # the last of each resolution
                    stage = (0, 3, 6, 13, 17).index(piece)
                    stored[f"stage{stage}"] = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
            stored[f"logits_removed{removed}"] = net(images).numpy()
    for name, x in stored.items():
        print(name, x.shape, f"{x.min():.3g} to {x.max():.3g}")
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
