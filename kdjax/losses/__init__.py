"""Distillation losses as pure functions: arrays in, one value per example out.

Arrays are positional, the student's before the teacher's; options are keyword-only. The caller takes the mean and
writes the weights::

    hard = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
    soft = losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=4.0)
    loss = hard_weight * jnp.mean(hard) + soft_weight * jnp.mean(soft)

Losses that compare the examples of a batch with each other return one scalar, and say so.

**Input checks.** Every call checks its arguments against the annotations: dimensions of one name must have one size, so
nothing broadcasts, and labels must be integers. These checks are static and work under ``jit``. Options out of range
and labels of C or more raise an error where their values are known: Python numbers, NumPy arrays, and JAX arrays
outside ``jit`` (the call then waits for the device). Under ``jit`` a label of C or more makes the value NaN.

**Void labels.** A negative label, such as -1 or -100, is void in every loss: the example has value and gradient zero,
whatever its logits are. It still counts in ``jnp.mean``; :func:`masked_mean` divides by the number of labelled examples
only, also when the batch is sharded over devices.

**Masked classes.** A logit of -inf, or of the lowest number of its dtype, masks its class. A class that the student
masks is removed for the teacher too, whose other probabilities are renormalised. A class that only the teacher masks
has probability zero for the teacher; losses on the logits themselves (:func:`squared_logits`, the ranks of
:func:`correlation_distance`) leave it out. An example without any class left has value zero. The cross-entropy with a
label that the student masks is infinite.
"""

from kdjax.losses.class_maps import bayesian_class_map as bayesian_class_map
from kdjax.losses.class_maps import bayesian_logit_weights as bayesian_logit_weights
from kdjax.losses.class_maps import check_class_map as check_class_map
from kdjax.losses.class_maps import class_map as class_map
from kdjax.losses.class_maps import least_squares_class_map as least_squares_class_map
from kdjax.losses.class_maps import map_classes as map_classes
from kdjax.losses.features import activation_boundary as activation_boundary
from kdjax.losses.features import attention_transfer as attention_transfer
from kdjax.losses.features import factor_transfer as factor_transfer
from kdjax.losses.features import fsp as fsp
from kdjax.losses.features import hint as hint
from kdjax.losses.features import mask_channels as mask_channels
from kdjax.losses.features import mask_positions as mask_positions
from kdjax.losses.features import mgd as mgd
from kdjax.losses.features import nst as nst
from kdjax.losses.features import ofd as ofd
from kdjax.losses.features import ofd_margin as ofd_margin
from kdjax.losses.features import reviewkd as reviewkd
from kdjax.losses.features import vid as vid
from kdjax.losses.features import vkd as vkd
from kdjax.losses.logits import confidence_penalty as confidence_penalty
from kdjax.losses.logits import dist as dist
from kdjax.losses.logits import dkd as dkd
from kdjax.losses.logits import jensen_shannon as jensen_shannon
from kdjax.losses.logits import label_smoothing_cross_entropy as label_smoothing_cross_entropy
from kdjax.losses.logits import logit_standardised_kl as logit_standardised_kl
from kdjax.losses.logits import soft_target_cross_entropy as soft_target_cross_entropy
from kdjax.losses.logits import soft_target_kl as soft_target_kl
from kdjax.losses.logits import squared_logits as squared_logits
from kdjax.losses.logits import teacher_free_kl as teacher_free_kl
from kdjax.losses.logits import top_k_kl as top_k_kl
from kdjax.losses.logits import wttm as wttm
from kdjax.losses.maps import attention_map as attention_map
from kdjax.losses.maps import attribution_map as attribution_map
from kdjax.losses.maps import gradient_match as gradient_match
from kdjax.losses.maps import map_distance as map_distance
from kdjax.losses.reductions import masked_mean as masked_mean
from kdjax.losses.reductions import sum_and_count as sum_and_count
from kdjax.losses.refilled import centre_logits as centre_logits
from kdjax.losses.refilled import class_centres as class_centres
from kdjax.losses.refilled import local_kl as local_kl
from kdjax.losses.refilled import triplet_relations as triplet_relations
from kdjax.losses.regression import best_hard_weight as best_hard_weight
from kdjax.losses.regression import one_shot_hard_weight as one_shot_hard_weight
from kdjax.losses.regression import squared_error as squared_error
from kdjax.losses.relations import CrdMemory as CrdMemory
from kdjax.losses.relations import cka as cka
from kdjax.losses.relations import correlation_congruence as correlation_congruence
from kdjax.losses.relations import correlation_distance as correlation_distance
from kdjax.losses.relations import crd as crd
from kdjax.losses.relations import crd_candidates as crd_candidates
from kdjax.losses.relations import info_nce as info_nce
from kdjax.losses.relations import init_crd_memory as init_crd_memory
from kdjax.losses.relations import pkt as pkt
from kdjax.losses.relations import rkd_angle as rkd_angle
from kdjax.losses.relations import rkd_distance as rkd_distance
from kdjax.losses.relations import similarity_preserving as similarity_preserving
from kdjax.losses.targets import average_logits as average_logits
from kdjax.losses.targets import average_probabilities as average_probabilities
from kdjax.losses.targets import confidence_weights as confidence_weights
from kdjax.losses.targets import cutmix_targets as cutmix_targets
from kdjax.losses.targets import dice as dice
from kdjax.losses.targets import lovasz as lovasz
from kdjax.losses.targets import mixup_targets as mixup_targets
from kdjax.losses.targets import noisy_teacher as noisy_teacher
from kdjax.losses.targets import privileged as privileged
from kdjax.losses.targets import spread_top_k as spread_top_k
