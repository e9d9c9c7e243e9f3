"""Launching an experiment from the command line: flags, workdirs, locks and workers.

Nothing here decides what an experiment computes, and importing it defines no flag.
"""

from experiments.cli.inputs import Data as Data
from experiments.cli.inputs import network as network
from experiments.cli.launching import launch as launch
from experiments.cli.options import MAY_CHANGE as MAY_CHANGE
from experiments.cli.options import Flags as Flags
from experiments.cli.options import Launch as Launch
from experiments.cli.options import define as define
from experiments.cli.options import define_arms as define_arms
from experiments.cli.options import define_seeds as define_seeds
from experiments.cli.options import flags_of as flags_of
from experiments.cli.options import given as given
from experiments.cli.options import may_change as may_change
from experiments.cli.options import parse_seeds as parse_seeds
from experiments.cli.options import parse_weights as parse_weights
from experiments.cli.options import refuse_given as refuse_given
from experiments.cli.options import settings as settings
from experiments.cli.teachers import Teacher as Teacher
from experiments.cli.teachers import Teachers as Teachers
from experiments.cli.teachers import ask as ask
from experiments.cli.teachers import define_teacher as define_teacher
from experiments.cli.teachers import teachers as teachers
from experiments.cli.workdirs import begin as begin
from experiments.cli.workdirs import check_disk as check_disk
from experiments.cli.workdirs import claim_workdir as claim_workdir
from experiments.cli.workdirs import released as released
from experiments.cli.workdirs import shared_cache as shared_cache
from experiments.cli.workers import in_children as in_children
from experiments.cli.workers import my_task as my_task
from kdjax.callbacks import say as say
