"""Makes attributions_goldens.npz: what captum attributes to the pixels of a small network.

Run with captum 0.9.0 and PyTorch 2.13 on a CPU: ``python tests/goldens/attributions.py``. Images are NHWC and kernels
HWIO in the file; the rules are captum's ``method``, its trapezoid excepted, whose weights add up to (n - 1) / n.
"""

from pathlib import Path

import captum
import numpy as np
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency


def main() -> None:
    """Draws a network, asks captum, writes the file beside this one."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 5, 3),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Flatten(),
        torch.nn.Linear(5 * 4 * 4, 3),
    ).double()
    inputs, baselines = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 2])
    found = {
        f"{method}_{steps}": IntegratedGradients(network).attribute(
            inputs, baselines, target=labels, n_steps=steps, method=method
        )
        for method in ("gausslegendre", "riemann_middle")
        for steps in (5, 20)
    }
    found["input_times_gradient"] = InputXGradient(network).attribute(inputs, target=labels)
    found["gradient"] = Saliency(network).attribute(inputs, target=labels, abs=False)
    state = network.state_dict()
    dense = state["5.weight"].reshape(3, 5, 4, 4).permute(2, 3, 1, 0).reshape(-1, 3)
    arrays = {
        "inputs": inputs.permute(0, 2, 3, 1),
        "baselines": baselines.permute(0, 2, 3, 1),
        "labels": labels,
        "kernel_0": state["0.weight"].permute(2, 3, 1, 0),
        "bias_0": state["0.bias"],
        "kernel_1": state["2.weight"].permute(2, 3, 1, 0),
        "bias_1": state["2.bias"],
        "kernel_2": dense,
        "bias_2": state["5.bias"],
        **{name: values.permute(0, 2, 3, 1) for name, values in found.items()},
    }
    path = Path(__file__).parent / "attributions_goldens.npz"
    rounded = {
        name: array.detach().numpy().astype(np.int32 if name == "labels" else np.float32)
        for name, array in arrays.items()
    }
    np.savez_compressed(path, **rounded)
    print(f"{path.name}: captum {captum.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
