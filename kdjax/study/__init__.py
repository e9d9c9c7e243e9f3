"""A study: finished arms, what else is measured of them, and their result as JSON, figure, report and table."""

from kdjax.study.conclusion import TABLE as TABLE
from kdjax.study.conclusion import Study as Study
from kdjax.study.conclusion import conclude as conclude
from kdjax.study.conclusion import declare as declare
from kdjax.study.conclusion import publish as publish
from kdjax.study.conclusion import weak_teachers as weak_teachers
from kdjax.study.measures import agreement_of as agreement_of
from kdjax.study.measures import answers_of as answers_of
from kdjax.study.measures import costs_of as costs_of
from kdjax.study.measures import densities_of as densities_of
from kdjax.study.measures import embeddings_of as embeddings_of
from kdjax.study.measures import flatness_of as flatness_of
from kdjax.study.measures import logits_of as logits_of
from kdjax.study.measures import of_every_run as of_every_run
from kdjax.study.measures import pictures as pictures
from kdjax.study.measures import robustness_of as robustness_of
from kdjax.study.measures import saliency_of as saliency_of
from kdjax.study.measures import surfaces_of as surfaces_of
from kdjax.study.measures import with_class_accuracy as with_class_accuracy
from kdjax.study.measures import with_costs as with_costs
from kdjax.study.measures import with_metrics as with_metrics
from kdjax.study.notes import Arms as Arms
from kdjax.study.notes import comparison_notes as comparison_notes
from kdjax.study.notes import equivalence_note as equivalence_note
from kdjax.study.notes import main_effect_note as main_effect_note
from kdjax.study.notes import mcnemar_note as mcnemar_note
