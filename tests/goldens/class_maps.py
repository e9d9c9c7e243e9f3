"""Writes class_maps.npz: the matrices of Bayesian label mapping by its authors' own code.

Needs torch, tqdm and their ``mapping.py`` (github.com/tmlr-group/BayesianLM, commit 3fe9155a):
``python tests/goldens/class_maps.py mapping.py``. A network that returns its input stands for theirs.
"""

import runpy
import sys
from pathlib import Path

import numpy as np

EXAMPLES, SOURCES, CLASSES = 60, 7, 4


def main(code):
    import torch

    theirs = runpy.run_path(code)
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(EXAMPLES) % CLASSES)
    # Teacher classes that depend on the class, so that the matrix isn't flat; the last is hardly predicted.
    logits = rng.normal(size=(EXAMPLES, SOURCES)) * 2 + 2 * (np.arange(SOURCES) % CLASSES == labels[:, None])
    logits[:, -1] -= 5
    logits = logits.astype(np.float32)
    prompt = torch.nn.Linear(1, 1)  # asked for its device alone
    prompt.forward = lambda x: x
    batches = [
        (torch.from_numpy(logits[i : i + 20]), torch.from_numpy(labels[i : i + 20])) for i in (0, 20, 40)
    ]

    def network(x):
        return x

    found = {
        "blm": theirs["blm_reweight_matrix"](prompt, network, batches, lap=1),
        "blm_plus": theirs["blmp_reweight_matrix"](prompt, network, batches, lap=0, k=3),
    }
    arrays = {name: matrix.numpy() for name, matrix in found.items()}
    np.savez(Path(__file__).with_suffix(".npz"), logits=logits, labels=labels, **arrays, allow_pickle=False)


if __name__ == "__main__":
    main(sys.argv[1])
