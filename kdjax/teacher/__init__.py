"""What a teacher says of every example: computed once and cached by index, or asked in the step.

* :func:`precompute`, :func:`load`, :func:`gather`, :func:`verify`: the cache, on disk and in a batch.
* :func:`answers`: a teacher as a :class:`TeacherSignal`, cached or online, for :mod:`kdjax.run`;
  :func:`from_file`: the same of a teacher in any framework, from an ``.npz`` of its answers.
* :func:`explain`: cached integrated-gradients maps of the training images; :func:`with_maps` adds them to a signal;
  :func:`perturb` makes it a control.
* :func:`in_classes`: a teacher of other classes, in those of the student; :func:`through_map`, :func:`through_weights`,
  :func:`through_probe`: by a map or a probe of your own; :func:`about_classes` keeps what it says of some classes.
"""

from kdjax.teacher.cache import TeacherCache as TeacherCache
from kdjax.teacher.cache import TeacherFn as TeacherFn
from kdjax.teacher.cache import describe as describe
from kdjax.teacher.cache import gather as gather
from kdjax.teacher.cache import load as load
from kdjax.teacher.cache import precompute as precompute
from kdjax.teacher.cache import verify as verify
from kdjax.teacher.maps import Explanations as Explanations
from kdjax.teacher.maps import explain as explain
from kdjax.teacher.maps import with_maps as with_maps
from kdjax.teacher.other_classes import WAYS as WAYS
from kdjax.teacher.other_classes import about_classes as about_classes
from kdjax.teacher.other_classes import in_classes as in_classes
from kdjax.teacher.other_classes import probe_of as probe_of
from kdjax.teacher.other_classes import through_map as through_map
from kdjax.teacher.other_classes import through_probe as through_probe
from kdjax.teacher.other_classes import through_weights as through_weights
from kdjax.teacher.other_classes import translate as translate
from kdjax.teacher.signal import MODES as MODES
from kdjax.teacher.signal import VIEW_SEED as VIEW_SEED
from kdjax.teacher.signal import TeacherSignal as TeacherSignal
from kdjax.teacher.signal import TrainedNetwork as TrainedNetwork
from kdjax.teacher.signal import answers as answers
from kdjax.teacher.signal import attach as attach
from kdjax.teacher.signal import attach_online as attach_online
from kdjax.teacher.signal import from_file as from_file
from kdjax.teacher.signal import perturb as perturb
