"""Names of experiments.cli under which experiments/common knows them; gone when that is."""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.cli import workdirs
from experiments.cli.launching import check_finite as check_finite
from experiments.cli.launching import launch as launch
from experiments.cli.launching import say as say
from experiments.cli.options import refuse_given as refuse_given
from experiments.cli.workdirs import claim_workdir as claim_workdir
from experiments.cli.workdirs import file_lock as alone  # noqa: F401
from experiments.cli.workdirs import released as released
from kdjax.callbacks import bar as bar

_locks = workdirs._claimed


def settings_of(module: Mapping[str, Any], *, apart: Sequence[str]) -> dict[str, Any]:
    """The flags in a module's ``globals()``, without some."""
    own = {holder.name: holder.value for holder in module.values() if isinstance(holder, flags.FlagHolder)}
    return {name: value for name, value in sorted(own.items()) if name not in apart}
