"""Distillation losses as pure functions: arrays in, one value per example out.

Arrays are positional, the student's before the teacher's; everything else is keyword-only. The caller takes the mean
and writes the weights, so that what is minimised can be read where it is used::

    hard = optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
    soft = losses.soft_target_kl(outputs.logits, batch["teacher_logits"], temperature=4.0)
    loss = hard_weight * jnp.mean(hard) + soft_weight * jnp.mean(soft)
"""

from kdjax.losses.logits import soft_target_kl as soft_target_kl
