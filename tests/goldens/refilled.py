"""Writes refilled.npz: both stages of REFILLED, one epoch each, by its authors' own code.

Needs torch, pytorch-metric-learning, tqdm and a checkout of github.com/njulus/REFILLED at commit be649aa4:
``python tests/goldens/refilled.py CHECKOUT``. Networks that look up embeddings and logits by the number of the example
stand for theirs.
"""

import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

EXAMPLES, CLASSES, STUDENT, TEACHER = 12, 6, 5, 7  # the last two are widths


def main(code):
    import torch

    torch.Tensor.cuda = lambda self, *_: self
    sys.modules["utils.global_variable"] = types.ModuleType("global_variable")  # looks for a GPU
    sys.path.insert(0, code)
    import Train

    rng = np.random.default_rng(0)
    labels = np.array(
        [0, 1, 1, 3, 0, 1, 4, 5, 5, 4, 4, 3]
    )  # two batches, each of three classes; none of class 2
    # Drawn around their classes, so that triplets are of all kinds; not negative, as after a ReLU.
    drawn = {
        who: np.abs(rng.normal(size=(EXAMPLES, width)) + 1.2 * rng.normal(size=(CLASSES, width))[labels])
        for who, width in (("student", STUDENT), ("teacher", TEACHER))
    }
    arrays = {
        "labels": labels,
        "student_embedding": drawn["student"],
        "teacher_embedding": 2 * drawn["teacher"],
        "student_logits": 2 * rng.normal(size=(EXAMPLES, CLASSES)),
    }
    arrays = {name: x.astype(np.int64 if x.dtype == int else np.float32) for name, x in arrays.items()}

    class Network(torch.nn.Module):
        def __init__(self, embedding, logits=None):
            super().__init__()
            self.embedding = torch.nn.Parameter(torch.tensor(embedding))
            self.logits = None if logits is None else torch.nn.Parameter(torch.tensor(logits))
            self.fc = torch.nn.Linear(embedding.shape[1], CLASSES)  # asked for its width alone

        def forward(self, numbers, flag_embedding=False, flag_both=False):
            own = self.embedding[numbers.long()]
            if flag_embedding:
                return own
            logits = self.logits[numbers.long()]
            return (logits, own) if flag_both else logits

        def get_network_params(self):
            return [self.embedding]

        def get_classifier_params(self):
            return [self.logits]

    class Data(list):
        """A loader of batches that is its own data set."""

        dataset = property(lambda self: self)

        def get_n_classes(self):
            return CLASSES

        def __len__(self):
            return EXAMPLES

    def batches(size):
        return Data(
            (torch.arange(i, i + size), torch.from_numpy(labels[i : i + size]))
            for i in range(0, EXAMPLES, size)
        )

    def epoch(stage, size, **changes):
        student = Network(arrays["student_embedding"], arrays["student_logits"])
        teacher = Network(arrays["teacher_embedding"])
        seen = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
        for name, p in student.named_parameters():
            p.register_hook(lambda gradient, name=name: seen.__setitem__(name, seen[name] + gradient))
        options = {"flag_no_bar": True, "flag_debug": True, "devices": [0], "flag_merge": False, "wd": 0.0}
        options |= {"mo": 0.9, "data_name": "drawn", "teacher_network_name": "looked_up", **changes}
        found = stage(
            types.SimpleNamespace(**options), batches(size), batches(EXAMPLES), teacher, student, None
        )
        return found, {name: gradient.numpy() for name, gradient in seen.items()}

    (loss, _), gradients = epoch(Train.train_stage1, EXAMPLES, lr1=0.1, n_training_epochs1=1, tau1=4)
    arrays |= {"triplets/loss": np.float32(loss[0]), "triplets/grad": gradients["embedding"]}

    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("saves/class_centers").mkdir(parents=True)
        # At a rate of 0, so that both batches meet the same student.
        options = {"lr2": 0.0, "point": (9,), "gamma": 0.2, "n_training_epochs2": 1, "tau2": 2, "lambd": 100}
        (hard, soft, *_), gradients = epoch(Train.train_stage2, EXAMPLES // 2, **options)
        (centres,) = (torch.load(path) for path in Path("saves/class_centers").iterdir())
        os.chdir(home)
    arrays |= {
        "centres": centres.numpy(),
        "local/hard": np.float32(hard[0]),
        "local/soft": np.float32(soft[0]),
        "local/grad": gradients["logits"],
    }
    np.savez(Path(__file__).with_suffix(".npz"), **arrays, allow_pickle=False)


if __name__ == "__main__":
    main(sys.argv[1])
