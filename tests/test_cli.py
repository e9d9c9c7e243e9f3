"""Flags made from dataclasses, the networks and data that they name, and workdirs that belong to one run."""

import numpy as np
import pytest
from absl import flags

from experiments import cli
from kdjax import data, models, results, study

EXPERIMENT = """
import dataclasses
from absl import flags
from experiments import cli
from kdjax.options import option
from kdjax.recipe import Machine, Recipe


@dataclasses.dataclass(frozen=True)
class Own:
    name: str = option(None, "Must be given.")
    size: int = option(3, "Of something.", least=1, most=9)
    rate: float | None = option(None, "Of something else.", least=0.0)
    kinds: tuple[str, ...] = option(("a", "b"), "Some.")
    counts: tuple[int, ...] | None = option(None, "Numbers.")
    sort: str = option("bubble", "An algorithm.", choices=("bubble", "quick"))
    fast: bool = option(False, "Whether.")


OWN = cli.define(Own(), prefix="own_")
RECIPE = cli.define(Recipe(epochs=7, padding=4), omit=("momentum",))
TEACHER = cli.define(RECIPE, prefix="teacher_", only=("epochs", "ema", "flip"))
MACHINE = cli.define(Machine())
SEEDS = cli.define_seeds()
ARMS = cli.define_arms(("scratch", "kd", "crd"), baseline="scratch")
LAUNCH = cli.define(cli.Launch(workdir="runs/here"), only=("workdir", "split", "shared_cache"))
ROBUSTNESS = cli.may_change(flags.DEFINE_bool("robustness", False, "Also."))
SPEED = flags.DEFINE_float("speed", 1.0, "Of light.")


def settings():
    return cli.settings(__name__)
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, alone):
    """The module above, with no other experiment's flags in the process."""
    directory = tmp_path_factory.mktemp("mine")
    (directory / "flagged.py").write_text(EXPERIMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        with alone("flagged") as module:
            yield module


@pytest.fixture
def parse(experiment):
    def parse(*arguments):
        flags.FLAGS.unparse_flags()
        for flag in cli.flags_of("flagged").values():
            flag.unparse()
        flags.FLAGS(["flagged", "--own_name=x", *arguments])
        return experiment

    return parse


class TestDefine:
    def test_fields_are_flags_with_their_types_ranges_and_help(self, experiment):
        found = cli.flags_of("flagged")
        assert {
            "own_name",
            "own_size",
            "teacher_epochs",
            "epochs",
            "seeds",
            "arms",
            "workdir",
        } <= found.keys()
        assert {"momentum", "teacher_padding", "output"}.isdisjoint(found)
        assert found["own_size"].help == "Of something."
        assert found["teacher_ema"].help.endswith("As --ema by default.")
        parser = found["own_size"].parser
        assert (parser.lower_bound, parser.upper_bound) == (1, 9)
        assert found["own_sort"].parser.enum_values == ["bubble", "quick"]
        assert "own_size" in {flag.name for flag in flags.FLAGS.get_key_flags_for_module("flagged")}

    def test_defaults_are_those_of_the_instance(self, parse):
        module = parse()
        assert module.OWN.value == module.Own(name="x")
        assert module.RECIPE.value == module.Recipe(epochs=7, padding=4)
        assert module.MACHINE.value == module.Machine()
        assert module.SEEDS.value == [0, 1, 2, 3, 4]
        assert module.ARMS.value == ["scratch", "kd", "crd"]

    def test_what_is_given_stands_in_the_dataclass(self, parse):
        own = ("--own_size=9", "--own_rate=0.5", "--own_kinds=c", "--own_counts=1,2", "--own_sort=quick")
        module = parse(*own, "--own_fast", "--seeds=3,1", "--arms=crd,scratch")
        assert module.OWN.value == module.Own("x", 9, 0.5, ("c",), (1, 2), "quick", True)
        assert module.SEEDS.value == [3, 1]
        assert module.ARMS.value == ["scratch", "crd"]  # in the table's order

    def test_a_second_recipe_is_the_first_but_for_what_is_given(self, parse):
        assert parse("--epochs=5").TEACHER.value == parse("--epochs=5").RECIPE.value
        module = parse("--epochs=5", "--teacher_epochs=9", "--flip", "--noteacher_flip")
        assert (module.TEACHER.value.epochs, module.TEACHER.value.flip) == (9, False)
        assert module.TEACHER.value.padding == 4
        assert module.RECIPE.value.epochs == 5

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("--ema=1", "^--ema=1 would keep the first weights"),
            ("--teacher_ema=1", "^--teacher_ema=1 would keep"),
            ("--own_counts=1,b", "--own_counts=1,b must be whole numbers"),
            ("--seeds=0,one", "--seeds=0,one must be whole numbers"),
            ("--seeds=1,1", "must be different numbers"),
            ("--seeds=", "--seeds= must be different numbers"),
            ("--seeds=-1", "must be different numbers from 0"),
            ("--seeds=4294967296", "must be different numbers from 0 to 4294967295"),
            ("--arms=kdd,scratch", "no arm 'kdd'; there are scratch, kd, crd"),
            ("--arms=kd", "must include scratch"),
            ("--arms=scratch,scratch", "must name different arms"),
        ],
    )
    def test_contradictions_are_one_sentence_that_names_the_flag(self, parse, argument, said):
        module = parse(argument)
        handles = (module.OWN, module.RECIPE, module.TEACHER, module.SEEDS, module.ARMS)
        with pytest.raises(ValueError, match=said):
            _ = [handle.value for handle in handles]

    @pytest.mark.parametrize(
        "argument",
        ["--own_size=10", "--own_sort=heap", "--own_rate=-1", "--teacher_epochs=0", "--split=train"],
    )
    def test_absl_refuses_what_is_out_of_range(self, parse, argument):
        with pytest.raises(flags.Error, match=argument.split("=")[0].strip("-")):
            parse(argument)

    def test_a_field_without_a_value_must_be_given(self, experiment):
        flags.FLAGS.unparse_flags()
        cli.flags_of("flagged")["own_name"].unparse()
        with pytest.raises(flags.Error, match="--own_name must have a value"):
            flags.FLAGS(["flagged"])

    def test_settings_are_the_flags_that_may_not_change(self, parse):
        module = parse("--speed=2", "--own_counts=1,2")
        found = module.settings()
        assert (found["speed"], found["own_counts"], found["teacher_epochs"]) == (2.0, ["1", "2"], None)
        assert {"split", "seeds", "steps_per_dispatch"} <= found.keys()
        free = {"workdir", "shared_cache", "devices", "save_every_s", "arms", "robustness"}
        assert free.isdisjoint(found)
        assert free <= cli.flags_of("flagged").keys()

    def test_flags_that_decide_nothing_are_refused(self, parse):
        parse("--speed=2", "--epochs=7")
        with pytest.raises(ValueError, match=r"--speed=2.0 and --epochs=7 would change nothing: it rains\."):
            cli.refuse_given(["speed", "robustness", "epochs"], "it rains")


class TestData:
    def test_asks_for_what_the_fields_say(self, monkeypatch):
        asked = {}
        monkeypatch.setattr(data, "load", lambda name, **options: asked.update(options, name=name))
        monkeypatch.setattr(data, "split", lambda loaded, **options: asked.update(options))
        own = cli.Data(dataset="mnist", image_size=(8, 9), num_train=100, split_by="example")
        own.load()
        assert asked == {
            "name": "mnist",
            "data_dir": None,
            "image_size": (8, 9),
            "skip_broken": False,
            "num_train": 100,
            "num_validation": 0,
            "by_group": False,
            "label_noise": 0.0,
            "clip": False,
        }
        own.load(num_train=0, num_validation=5)
        assert (asked["num_train"], asked["num_validation"]) == (0, 5)
        for given, at_most, expected in ((0, 64, 64), (32, 64, 32), (100, 64, 64)):
            own.load(at_most=at_most, num_train=given)
            assert (asked["num_train"], asked["clip"]) == (expected, True)


NETWORKS = """
from __future__ import annotations

import flax.linen as nn
import jax
from kdjax import models
from kdjax.types import Outputs


class Net(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape((len(x), -1))
        return Outputs(nn.Dense(self.num_classes)(x), {"embedding": x})


def build(num_classes):
    return Net(num_classes)


def linear(num_classes):
    import equinox as eqx

    class Linear(eqx.Module):
        layer: eqx.nn.Linear

        def __init__(self, key):
            self.layer = eqx.nn.Linear(64, num_classes, key=key)

        def __call__(self, x):
            return self.layer(x.ravel())

    return models.from_equinox(Linear, (8, 8, 1))


def number(num_classes):
    return 3
"""


class TestNetwork:
    @pytest.fixture
    def dataset(self):
        images, labels = np.zeros((6, 8, 8, 1), np.uint8), np.arange(6, dtype=np.int32) % 3
        return data.Dataset(
            "tiny", images, labels, np.arange(6).astype(str), np.zeros(6, np.int8), ("a", "b", "c")
        )

    @pytest.fixture
    def mine(self, tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text(NETWORKS)
        (tmp_path / "broken.py").write_text("import nothing_at_all")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    def test_of_kdjax_by_name(self, dataset):
        found = cli.network("digits_student", dataset, width=5)
        assert isinstance(found, models.Network)
        assert found.description["width"] == 5
        with pytest.raises(ValueError, match=r"digits_studnet.*did you mean 'digits_student'"):
            cli.network("digits_studnet", dataset)

    @pytest.mark.parametrize("where", ["mine.py", "{mine}/mine.py", "mine"])
    def test_of_ones_own_by_file_or_module(self, dataset, mine, where):
        found = cli.network(f"{where.format(mine=mine)}:build", dataset)
        assert found.image_shape == (8, 8, 1)
        images = np.zeros((2, 8, 8, 1), np.float32)
        assert found.apply(*found.init(0), images, train=False)[0].logits.shape == (2, 3)

    def test_of_another_framework(self, dataset, mine):
        assert cli.network("mine.py:linear", dataset).output_shapes.logits.shape == (2, 3)
        with pytest.raises(ValueError, match=r"is for images of shape \(8, 8, 1\); tiny has \(4, 4, 1\)"):
            cli.network("mine.py:linear", dataset._replace(images=dataset.images[:, :4, :4]))

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            ("yours.py:build", r"yours.py:build: there is no file yours.py\."),
            ("mine.py:biuld", r"mine.py:biuld: there is no function 'biuld' in mine.py\."),
            ("mine.py:number", "must return a linen module or a kdjax.models.Network, it returned int"),
            ("yours.net:build", "yours.net:build: No module named 'yours'; for a file, write"),
            ("broken.py:build", "broken.py:build: No module named 'nothing_at_all'.$"),
        ],
    )
    def test_what_is_wrong_is_one_sentence(self, dataset, mine, spec, said):
        with pytest.raises(ValueError, match=said):
            cli.network(spec, dataset)


class TestWorkdir:
    def test_is_taken_up_again_by_the_same_run_only(self, tmp_path):
        settings = {"temperature": 3.0, "arms": ("scratch", "kd")}
        for _ in range(2):
            with cli.released():
                workdir = cli.claim_workdir(str(tmp_path / "run"), settings)
        (workdir / "kd").mkdir()
        (workdir / "kd" / "summary_test.json").write_text("{}")  # work, which must not mix with another run's
        with pytest.raises(ValueError, match=r"holds another run \(temperature 3.0 there and 4.0 here\)"):
            cli.claim_workdir(str(workdir), settings | {"temperature": 4.0})

    @pytest.fixture
    def begin(self, tmp_path):
        """Begins a study in a workdir, and writes what its result would hold of it."""

        def begin(name, arms=("scratch", "kd"), *, supersedes="", **settings):
            output = str(tmp_path / "out.json")
            launch = cli.Launch(workdir=str(tmp_path / name), output=output, supersedes=supersedes)
            about = study.Study("mine", "Does it help?", "scratch")
            with cli.released():
                workdir = cli.begin(launch, settings, about, arms)
            plan = study.declare(workdir, about, arms)
            numbers = {"question": "?", "flags": {}, "seeds": [0], "wall_clock_s": 1.0, "plan": plan}
            result = results.make("mine", arms={arm: {"accuracy": [0.5]} for arm in arms}, **numbers)
            results.write(workdir / "results.json", result)
            results.write(launch.output, result, supersedes=supersedes)
            return plan

        return begin

    def test_a_result_of_another_run_stays_unless_a_reason_is_given(self, begin, tmp_path):
        begin("one")
        begin("one", ("scratch", "kd", "hint"))  # the same run with one arm more
        with pytest.raises(
            ValueError, match=r"out.json holds the result of another run, and results stay.*--supersedes"
        ):
            begin("two")
        assert not (tmp_path / "two").exists()
        begin("two", supersedes="A fault in one.")
        there = results.read(tmp_path / "out.json")["supersedes"]
        assert [one["why"] for one in there] == ["A fault in one."]
        assert set(results.read(tmp_path / there[0]["result"])["arms"]) == {"scratch", "kd", "hint"}

    def test_what_is_compared_is_written_down_first_and_stays(self, begin, tmp_path):
        first = begin("one")
        assert first[0]["primary"] == [["kd", "scratch"]]
        second = begin("one", ("scratch", "kd", "hint"))
        assert second[:1] == first
        assert second[1]["primary"] == [["kd", "scratch"], ["hint", "scratch"]]

    def test_a_run_without_work_leaves_no_plan_to_the_next(self, tmp_path):
        about = study.Study("mine", "Does it help?", "scratch")
        for rate, arms in ((1.0, ["scratch", "kd"]), (0.1, ["scratch", "hint"])):
            with cli.released():
                workdir = cli.begin(cli.Launch(workdir=str(tmp_path / "run")), {"rate": rate}, about, arms)
        (entry,) = study.declare(workdir, about, arms)
        assert entry["primary"] == [["hint", "scratch"]]

    def test_in_use_is_refused_until_it_is_given_back(self, tmp_path):
        with cli.released():
            cli.claim_workdir(str(tmp_path / "run"), {})
            with pytest.raises(ValueError, match="in use by another process"):
                cli.claim_workdir(str(tmp_path / "run"), {})
        with cli.released():
            cli.claim_workdir(str(tmp_path / "run"), {})

    def test_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("draft")
        with pytest.raises(ValueError, match="files of something else"):
            cli.claim_workdir(str(tmp_path), {})
        with pytest.raises(ValueError, match="is a file"):
            cli.claim_workdir(str(tmp_path / "thesis.tex"), {})
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_shared_cache_is_chosen_by_data_and_settings(self, tmp_path):
        def home(store, fingerprint, **decides):
            with cli.shared_cache(store, tmp_path / "own", fingerprint, **decides) as directory:
                return directory

        store = str(tmp_path / "store")
        assert home(None, {"content": "a"}) == tmp_path / "own"
        one = home(store, {"content": "a"}, temperature=3)
        assert one.parent == tmp_path / "store"
        assert home(store, {"content": "a"}, temperature=3) == one
        others = home(store, {"content": "b"}, temperature=3), home(store, {"content": "a"}, temperature=4)
        assert len({one, *others}) == 3
