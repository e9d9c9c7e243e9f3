"""What every experiment does around its question; nothing here decides what is measured.

No flags are defined here, so that any experiment may import it.
"""

from experiments.common.arms import BASIC as BASIC
from experiments.common.arms import Arm as Arm
from experiments.common.arms import check_arms as check_arms
from experiments.common.arms import check_methods as check_methods
from experiments.common.arms import make_arm as make_arm
from experiments.common.arms import seeds_of as seeds_of
from experiments.common.assessing import costs_of as costs_of
from experiments.common.assessing import robustness_of as robustness_of
from experiments.common.comparing import apart as apart
from experiments.common.comparing import disagreements as disagreements
from experiments.common.comparing import equal as equal
from experiments.common.comparing import main_effect as main_effect
from experiments.common.explaining import VARIANTS as VARIANTS
from experiments.common.explaining import Explained as Explained
from experiments.common.explaining import disturbed as disturbed
from experiments.common.explaining import explained_by as explained_by
from experiments.common.explaining import overlaid as overlaid
from experiments.common.explaining import pictures as pictures
from experiments.common.flatness import densities_of as densities_of
from experiments.common.flatness import flatness_of as flatness_of
from experiments.common.flatness import surfaces_of as surfaces_of
from experiments.common.launching import alone as alone
from experiments.common.launching import bar as bar
from experiments.common.launching import claim_workdir as claim_workdir
from experiments.common.launching import launch as launch
from experiments.common.launching import released as released
from experiments.common.launching import say as say
from experiments.common.launching import settings_of as settings_of
from experiments.common.many import train_many as train_many
from experiments.common.methods import METHODS as METHODS
from experiments.common.objectives import kd as kd
from experiments.common.objectives import scratch as scratch
from experiments.common.reporting import conclude as conclude
from experiments.common.tasks import Task as Task
from experiments.common.tasks import build as build
from experiments.common.tasks import make_task as make_task
from experiments.common.tasks import shown as shown
from experiments.common.teachers import Teacher as Teacher
from experiments.common.teachers import load_teacher as load_teacher
from experiments.common.teachers import network_in as network_in
from experiments.common.teachers import taught_by as taught_by
from experiments.common.teachers import train_teacher as train_teacher
from experiments.common.training import OPTIMIZERS as OPTIMIZERS
from experiments.common.training import SCHEDULES as SCHEDULES
from experiments.common.training import Recipe as Recipe
from experiments.common.training import Taught as Taught
from experiments.common.training import Trained as Trained
from experiments.common.training import check_disk as check_disk
from experiments.common.training import make_trainer as make_trainer
from experiments.common.training import shelf as shelf
from experiments.common.training import tensorboard as tensorboard
from experiments.common.training import watched as watched
