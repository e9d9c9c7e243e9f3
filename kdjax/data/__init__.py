"""Images and labels as arrays addressed by index: loading, splits, batches, augmentation and normalisation."""

from kdjax.data.about import licence_of as licence_of
from kdjax.data.about import resize_of as resize_of
from kdjax.data.augmentation import crop_and_flip as crop_and_flip
from kdjax.data.augmentation import example_keys as example_keys
from kdjax.data.augmentation import mixup as mixup
from kdjax.data.augmentation import normalise as normalise
from kdjax.data.augmentation import stored_view as stored_view
from kdjax.data.batches import Feed as Feed
from kdjax.data.batches import channel_statistics as channel_statistics
from kdjax.data.batches import epoch_index as epoch_index
from kdjax.data.batches import evaluation_index as evaluation_index
from kdjax.data.batches import gather as gather
from kdjax.data.batches import resident_feed as resident_feed
from kdjax.data.datasets import GROUP_PATTERNS as GROUP_PATTERNS
from kdjax.data.datasets import Dataset as Dataset
from kdjax.data.datasets import digest as digest
from kdjax.data.datasets import from_arrays as from_arrays
from kdjax.data.datasets import groups_of as groups_of
from kdjax.data.datasets import load as load
from kdjax.data.datasets import split_ids as split_ids
from kdjax.data.datasets import split_notes as split_notes
from kdjax.data.datasets import subset as subset
from kdjax.data.datasets import with_label_noise as with_label_noise
from kdjax.data.prepare import prepare as prepare
from kdjax.data.split import split as split
