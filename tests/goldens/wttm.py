"""Writes wttm.npz: weighted transformed teacher matching by its authors' own code, on the logits of loss_goldens.npz.

Needs torch and the file distiller_zoo/wttm.py of github.com/zkxufo/TTM: ``python tests/goldens/wttm.py THAT_FILE``.
"""

import runpy
import sys
from pathlib import Path

import numpy as np


def main(code):
    import torch

    here = Path(__file__).parent
    goldens, loss, arrays = np.load(here / "loss_goldens.npz"), runpy.run_path(code)["WTTM"], {}
    for temperature in (1, 2, 5, 10):
        student = torch.tensor(goldens["logits_student"], requires_grad=True)
        value = loss(1 / temperature)(student, torch.tensor(goldens["logits_teacher"]))
        value.backward()
        arrays[f"{temperature}/loss"] = value.detach().numpy()
        arrays[f"{temperature}/gradient"] = student.grad.numpy()
    np.savez(here / "wttm.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
