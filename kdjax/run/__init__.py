"""Training a student, from a data set to measured weights on disk.

::

    dataset = data.split(data.from_arrays(images, labels))
    teacher = run.train(large, methods.labels(), dataset, Recipe(epochs=30), directory="runs/teacher")
    student = run.train(small, methods.kd() + methods.crd(), dataset, Recipe(epochs=60), teacher=teacher)
    student.metrics["accuracy"]

With a directory a run can be killed at any moment: the same call continues it, and a finished run is read back.

* :func:`train`: one network. :func:`make_trainer`: the same, compiled once for many seeds.
* :func:`train_many`: many seeds or settings in one program.
* :func:`load`, :func:`describe`, :func:`save`: finished networks on disk. :func:`measured`: one that is in memory.
* :func:`check`: what can be refused before anything is trained.
"""

from kdjax.run.finished import Trained as Trained
from kdjax.run.finished import describe as describe
from kdjax.run.finished import load as load
from kdjax.run.finished import measured as measured
from kdjax.run.finished import save as save
from kdjax.run.many import Many as Many
from kdjax.run.many import train_many as train_many
from kdjax.run.plan import check as check
from kdjax.run.plan import evaluation_batch_size as evaluation_batch_size
from kdjax.run.plan import identity_of as identity_of
from kdjax.run.training import Init as Init
from kdjax.run.training import make_trainer as make_trainer
from kdjax.run.training import train as train
