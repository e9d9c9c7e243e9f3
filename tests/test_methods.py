"""Methods: what they minimise, how they add up, what they refuse, and how a command line names them."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import losses, methods, models, parallel
from kdjax.types import Outputs

ROWS, CLASSES, STEPS = 8, 5, 240
LABELS = np.arange(24) % CLASSES

# Why the other public functions of kdjax.losses are no methods.
NOT_METHODS = {
    "average_logits": "for several teachers; here each student has one",
    "average_probabilities": "for several teachers",
    "best_hard_weight": "for regression",
    "one_shot_hard_weight": "for regression",
    "confidence_weights": "for several teachers",
    "cutmix_targets": "for an augmentation that the recipe does not have",
    "dice": "for dense outputs",
    "gradient_match": "for gradients in the input, which no batch holds",
    "lovasz": "for dense outputs",
    "masked_mean": "for void labels; a classification data set has none",
    "mask_positions": "mgd's masks in detection",
    "mixup_targets": "mixup in the recipe weights two cross-entropies instead",
    "ofd_margin": "for a normalisation right before the ReLU; ofd measures its margin",
    **dict.fromkeys(
        ("class_map", "bayesian_class_map", "bayesian_logit_weights", "least_squares_class_map"),
        "made once, of a teacher of other classes",
    ),
    "map_classes": "turns a teacher's logits into those of other classes, for any method on logits",
    "check_class_map": "refuses what is no map",
    "spread_top_k": "the other reading of stored probabilities; top_k_kl assumes less",
    "squared_error": "for regression",
    "sum_and_count": "for void labels, as masked_mean",
}


def outputs(seed, channels, *, rows=ROWS):
    """What a small network of two stages might return."""
    rng = np.random.default_rng(seed)
    features = {}
    for stage, (size, width) in enumerate(zip((8, 4, 2), channels, strict=True)):
        x = jnp.asarray(rng.normal(size=(rows, size, size, width)), jnp.float32)
        features[f"stage{stage}"] = jax.nn.relu(x)
        if stage:
            features[f"preactivation{stage}"] = x
    features["embedding"] = features["stage2"].mean((1, 2))
    return Outputs(jnp.asarray(2 * rng.normal(size=(rows, CLASSES)), jnp.float32), features)


STUDENT, TEACHER = outputs(0, (4, 4, 8)), outputs(1, (4, 4, 10))
FLOW = methods.fsp(student=("stage0", "stage1"), teacher=("stage0", "stage1"))  # where channels are equal


def on_one_device(function):
    """Compiled, under the name of the devices' axis; quickly, since it runs a few times."""
    mapped = jax.vmap(function, axis_name=parallel.AXIS)

    def run(*arguments):
        return jax.tree.map(lambda x: x[0], mapped(*jax.tree.map(lambda x: x[None], arguments)))

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def bind(method, teacher=TEACHER, student=STUDENT):
    return methods.bind(method, student, teacher, steps=STEPS, labels=LABELS)


def batch_for(bound, teacher=TEACHER):
    batch = {"label": jnp.arange(ROWS) % CLASSES, "position": jnp.arange(ROWS) * 2}
    if teacher is None:
        return batch
    asked = {f"teacher_{name}": teacher.features[name] for name in bound.teacher_features}
    return batch | {"teacher_logits": teacher.logits} | asked


def head_initialiser(bound):
    return methods.head_initialiser(bound.heads, STUDENT, batch_for(bound) | {"step": jnp.int32(0)})


def some_heads(bound):
    """Parameters and state of all heads; random, since compiling their initialisers takes longer than all else."""
    if bound.heads is None:
        return {}, {}
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: head_initialiser(bound)(0))
    params, state = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)
    return params, jax.tree.map(jnp.abs, state)  # variances among it


def evaluate(bound, student, params, state, batch):
    """The weighted terms on one device of several, and the heads' state afterwards."""
    found = dict(bound.objective(student, batch))
    if bound.heads is not None:
        apply = models.apply_fn(bound.heads)
        more, state = apply(params, state, (student, batch), train=True, key=jax.random.key(0))
        found |= more
    return found, state


def terms_of(method, teacher=TEACHER):
    """The weighted terms of a method on one device, as a function of the step."""
    bound = bind(method, teacher)
    params, state = (None, None) if bound.heads is None else some_heads(bound)

    @on_one_device
    def found(student, step):
        return evaluate(bound, student, params, state, batch_for(bound, teacher) | {"step": step})[0]

    return lambda step: {name: float(value) for name, value in found(STUDENT, jnp.int32(step)).items()}


def terms(method, teacher=TEACHER):
    return terms_of(method, teacher)(100)


def hard(outputs):
    label = jnp.arange(ROWS) % CLASSES
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(outputs.logits, label))


@pytest.fixture(scope="module")
def gradients():
    """``(term, step) -> values, gradient in the student, gradient in the heads``; one program for all methods."""
    method = sum((f() for name, f in methods.METHODS.items() if name != "fsp"), start=FLOW)
    bound = bind(method)
    params, state = some_heads(bound)
    batch = batch_for(bound)

    @on_one_device
    def pulled(weights, step):
        def values(student, params):
            return evaluate(bound, student, params, state, batch | {"step": step})[0]

        found, pull = jax.vjp(values, STUDENT, params)
        return found, *pull({name: weights.get(name, jnp.float32(0)) for name in found})

    names = [*methods.METHODS, "factor_transfer_head"]
    return lambda term, step: pulled({name: jnp.float32(name == term) for name in names}, jnp.int32(step))


class TestEveryMethod:
    @pytest.mark.parametrize("name", methods.METHODS)
    def test_moves_the_student_and_its_head(self, gradients, name):
        first = name in ("fsp", "activation_boundary")  # they have the first stage alone
        values, student, heads = gradients(name, 10 if first else 100)
        assert np.isfinite(values[name])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(student))
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(student))
        if f"{name}_head" in values:
            added = gradients(f"{name}_head", 100)[2]
            heads = jax.tree.map(np.add, heads, added)
        for path, leaf in jax.tree.leaves_with_path(heads.get(name, {})):
            assert np.any(leaf != 0), f"{jax.tree_util.keystr(path)} receives no gradient"
        assert all(
            not np.any(leaf) for other in heads.keys() - {name} for leaf in jax.tree.leaves(heads[other])
        )

    @pytest.mark.parametrize("name", methods.METHODS)
    def test_takes_its_weight_first_and_names_its_term(self, name):
        function = methods.METHODS[name]
        weight = next(iter(inspect.signature(function).parameters.values()))
        assert (weight.name, weight.default > 0) == ("weight", True)
        term, *others = function(0.25).terms
        assert (term.name, term.weight, function().terms[0].weight) == (name, 0.25, weight.default)
        assert [other.name for other in others] == ["refilled_triplets"] * (name == "refilled")
        if name not in ("rkd", "refilled"):  # of several losses
            assert callable(getattr(losses, name))

    def test_every_loss_is_used_by_a_method_or_it_is_said_why_not(self):
        source = "".join(path.read_text("utf-8") for path in Path(methods.__file__).parent.glob("*.py"))
        used = set(re.findall(r"losses\.([a-z_]+)", source))
        public = {n for n in dir(losses) if n.islower() and n[0] != "_" and callable(getattr(losses, n))}
        assert public - used == set(NOT_METHODS)


class TestTerms:
    def test_kd_is_the_labels_beside_the_softened_logits(self):
        assert terms(methods.labels(0.5)) == {"hard": pytest.approx(0.5 * float(hard(STUDENT)), rel=1e-6)}
        for temperature, own, soft in ((4.0, 0.1, 0.9), (2.0, 0.3, 0.6)):
            found = terms(methods.kd(temperature, hard_weight=own, soft_weight=soft))
            kl = losses.soft_target_kl(STUDENT.logits, TEACHER.logits, temperature=temperature).mean()
            assert found == {
                "hard": pytest.approx(own * float(hard(STUDENT)), rel=1e-6),
                "soft": pytest.approx(soft * float(kl), rel=1e-6),
            }

    def test_a_weight_multiplies_the_sum_over_the_compared_maps(self):
        pairs = [(STUDENT.features[f"stage{i}"], TEACHER.features[f"stage{i}"]) for i in (1, 2)]
        want = float(sum(losses.attention_transfer(s, t).mean() for s, t in pairs))
        for method, weight in ((methods.attention_transfer(), 1000), (methods.attention_transfer(10.0), 10)):
            found = terms(method)
            assert found["attention_transfer"] == pytest.approx(weight * want, rel=1e-5)
            assert found["hard"] == pytest.approx(float(hard(STUDENT)), rel=1e-6)

    def test_a_first_stage_is_alone_and_then_over(self):
        method = FLOW + methods.kd() + methods.hint()  # hint is a head, of which linen copies what it holds
        first, later = map(terms_of(method), (29, 30))
        assert first["fsp"] > 0
        assert first["hard"] == first["soft"] == first["hint"] == 0
        assert later["fsp"] == 0
        assert min(later["hard"], later["soft"], later["hint"]) > 0

    def test_a_warm_up_rises_over_twenty_of_240_epochs(self):
        at = np.array([found["dkd"] for found in map(terms_of(methods.dkd()), (0, 9, 19, 200))])
        np.testing.assert_allclose(at / at[-1], [1 / 20, 10 / 20, 1, 1], rtol=1e-5)

    def test_a_blend_of_two_images_has_the_labels_of_both(self):
        label, partner = jnp.arange(ROWS) % CLASSES, (jnp.arange(ROWS) + 3) % ROWS
        blended = methods.cross_entropy(
            STUDENT, {"label": label, "partner": partner, "share": jnp.full(ROWS, 0.25)}
        )
        soft = 0.25 * jax.nn.one_hot(label, CLASSES) + 0.75 * jax.nn.one_hot(label[partner], CLASSES)
        want = optax.losses.softmax_cross_entropy(STUDENT.logits, soft).mean()
        np.testing.assert_allclose(blended, want, rtol=1e-6)

    def test_methods_without_a_teacher_need_none(self):
        free = ("label_smoothing_cross_entropy", "confidence_penalty", "teacher_free_kl")
        for name in free:
            method = methods.METHODS[name]()
            assert np.isfinite(terms(method, teacher=None)[name])
            assert method.terms[0].teacher_free
        for name in methods.METHODS.keys() - set(free):
            with pytest.raises(
                ValueError, match=f"{name}(, refilled_triplets)? needs a teacher: pass teacher="
            ):
                bind(methods.METHODS[name](), None)


class TestHeads:
    @pytest.fixture(scope="class")
    @classmethod
    def crd(cls):
        bound = bind(methods.crd())
        return bound, head_initialiser(bound)

    def test_crd_remembers_the_examples_it_saw(self, crd):
        bound, new = crd
        params, state = new(0)
        batch = batch_for(bound) | {"step": jnp.int32(0)}
        after = on_one_device(lambda student: evaluate(bound, student, params, state, batch)[1])(STUDENT)
        before, now = (s["memory"]["crd"]["crd"] for s in (state, after))
        moved = np.flatnonzero(np.any(np.asarray(before.student != now.student), axis=1))
        np.testing.assert_array_equal(moved, np.arange(ROWS) * 2)
        assert float(before.student_z) == 0 < float(now.student_z)
        assert before.student.shape == (len(LABELS), 128)

    def test_start_differently_for_each_seed(self, crd):
        first, again, other = (jax.tree.leaves(crd[1](seed)[0]) for seed in (0, 0, 1))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))

    @pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices; conftest.py simulates them")
    def test_two_devices_see_the_whole_batch(self):
        names = ("rkd", "dist", "similarity_preserving", "ofd", "hint", "refilled")
        bound = bind(sum((methods.METHODS[name]() for name in names), start=methods.labels()))
        params, state = some_heads(bound)

        def run(student, batch):
            found, _ = evaluate(bound, student, params, state, batch | {"step": jnp.int32(100)})
            return jax.lax.pmean(found, parallel.AXIS)

        inputs = STUDENT, batch_for(bound)
        whole = on_one_device(run)(*inputs)
        halves = jax.tree.map(lambda x: x.reshape(2, ROWS // 2, *x.shape[1:]), inputs)
        halves = jax.pmap(run, axis_name=parallel.AXIS, devices=jax.devices()[:2])(*halves)
        assert set(whole) == {"hard", "refilled_triplets", *names}
        for term, value in whole.items():
            np.testing.assert_allclose(halves[term][0], value, rtol=2e-4, atol=1e-5)


class TestSum:
    def test_is_the_sum_of_the_terms(self):
        method = methods.labels() + methods.rkd() + methods.kd()
        found = terms(method)
        assert found.keys() == {"hard", "soft", "rkd"}
        assert found["rkd"] == pytest.approx(terms(methods.rkd())["rkd"], rel=1e-5)
        assert found["soft"] == pytest.approx(terms(methods.kd())["soft"], rel=1e-6)
        assert found["hard"] == pytest.approx(float(hard(STUDENT)), rel=1e-6)

    def test_counts_labels_once_with_the_larger_weight(self):
        assert (methods.labels(0.3) + methods.kd(hard_weight=0.1)).hard_weight == 0.3
        assert (methods.kd(hard_weight=0.5) + methods.labels(0.3)).hard_weight == 0.5
        with pytest.warns(UserWarning, match="below 0"):
            assert (methods.kd(hard_weight=-0.5) + methods.squared_logits(1.0)).hard_weight == -0.5

    def test_has_each_term_once(self):
        with pytest.raises(ValueError, match="each term once, got soft, crd, crd"):
            methods.kd() + methods.crd() + methods.crd(0.1)

    def test_applies_one_change_after_the_other(self):
        def change(text):
            return methods.Method(
                optimizer=lambda tx: f"{text}({tx})",
                init=lambda seed, state: f"{text}{seed}({state})",
                student=lambda apply: f"{text}({apply})",
                record=lambda before, after: {text: after - before, "both": text},
                settings={text: 1, "both": text},
            )

        both = change("a") + change("b")
        assert both.optimizer("x") == both.student("x") == "b(a(x))"
        assert both.init(7, "x") == "b7(a7(x))"
        assert both.record(1, 3) == {"a": 2, "b": 2, "both": "b"}
        assert both.settings == {"a": 1, "b": 1, "both": "b"}
        assert (change("a") + methods.sprkd()).second_batch

    def test_chains_blends(self):
        def blend(f):
            return methods.Method(blend=lambda batch, keys: f(batch["image"]) + batch["teacher_map"])

        batch = {"image": 3, "teacher_map": 10}
        both = blend(lambda x: 2 * x) + methods.labels() + blend(lambda x: -x)
        assert both.blend(batch, None) == -(2 * 3 + 10) + 10
        assert (methods.labels() + methods.kd()).blend is None

    def test_has_one_crop(self):
        assert (methods.kd() + methods.saliency_crop()).crop is not None
        with pytest.raises(ValueError, match="only one method of a sum can choose the crops"):
            methods.saliency_crop() + methods.saliency_crop()

    def test_keeps_your_own_losses_and_what_they_read(self):
        def narrow(outputs, batch):
            return {"narrow": jnp.mean(batch["teacher_stage2"]) + jnp.mean(outputs.logits)}

        method = methods.labels() + methods.objective(narrow, teacher_features=("stage2",))
        assert bind(method).teacher_features == ("stage2",)
        want = float(TEACHER.features["stage2"].mean() + STUDENT.logits.mean())
        assert terms(method)["narrow"] == pytest.approx(want, rel=1e-5)


class TestFeatures:
    def test_of_your_own_network_are_named(self):
        student = Outputs(STUDENT.logits, {"a": STUDENT.features["stage2"]})
        teacher = Outputs(TEACHER.logits, {"b": TEACHER.features["stage2"], "c": TEACHER.logits})
        bound = bind(methods.attention_transfer(2.0, student=("a",), teacher=("b",)), teacher, student)
        assert bound.teacher_features == ("b",)
        batch = batch_for(bound, teacher) | {"step": jnp.int32(0)}
        want = 2 * losses.attention_transfer(student.features["a"], teacher.features["b"]).mean()
        found = bound.objective(student, batch)["attention_transfer"]
        np.testing.assert_allclose(found, want, rtol=1e-6)

    def test_that_do_not_match_are_named(self):
        two = Outputs(TEACHER.logits, {k: v for k, v in TEACHER.features.items() if not k.endswith("2")})
        with pytest.raises(ValueError, match=r"attention_transfer compares stages.*teacher stage1\."):
            bind(methods.attention_transfer(), two)
        with pytest.raises(ValueError, match="the teacher has no block9"):
            bind(methods.hint(student=("stage1",), teacher=("block9",)))
        with pytest.raises(ValueError, match="compares last stage of both networks: the student has none"):
            bind(methods.cka(), TEACHER, Outputs(STUDENT.logits, {}))
        with pytest.raises(ValueError, match=r"fsp cannot compare these networks .*'stage2': \(2, 2, 10\)"):
            bind(methods.fsp())

    def test_a_method_needs_something_to_minimise(self):
        with pytest.raises(ValueError, match=r"nothing to minimise: add methods.labels\(\)"):
            bind(methods.sprkd())
        with pytest.raises(ValueError, match="nothing to minimise"):
            bind(methods.labels(0.0))


class TestNames:
    def test_a_sum_of_names_is_the_sum_of_methods(self):
        want = methods.labels() + methods.kd(hard_weight=1.0, soft_weight=1.0) + methods.crd()
        assert methods.named("crd+kd").description == methods.named("kd+crd").description == want.description
        assert methods.named("rkd+dkd").description == (methods.rkd() + methods.dkd()).description

    def test_one_name_is_the_method_itself(self):
        own = methods.kd(2.0, hard_weight=0.4, soft_weight=0.6)
        assert methods.named("scratch").description == methods.labels().description
        assert methods.named("kd").description == methods.kd().description
        assert methods.named("kd", kd=own) is own
        assert methods.named("pkt").description == methods.pkt().description
        assert methods.named("crd+kd", kd=own).terms[0].settings == {"temperature": 2.0}

    def test_weights_replace_the_published_ones(self):
        found = methods.named("crd+rkd", weights={"crd": 0.5})
        assert {term.name: term.weight for term in found.terms} == {"crd": 0.5, "rkd": 1.0}

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("at", "attention_transfer"),
            ("fitnet", "hint"),
            ("fitnets", "hint"),
            ("decoupled", "dkd"),
            ("contrastive", "crd"),
            ("overhaul", "ofd"),
            ("rdk", "rkd"),
        ],
    )
    def test_an_unknown_one_suggests_what_was_meant(self, name, meant):
        with pytest.raises(ValueError, match=rf"no method '{name}'; did you mean (\w+ or )*{meant}\b"):
            methods.named(f"{name}+kd")

    def test_what_resembles_none_lists_all(self):
        with pytest.raises(ValueError, match=r"there are scratch, kd, soft_target_cross_entropy, .*crd\."):
            methods.named("zzzz")
        with pytest.raises(ValueError, match="no method 'scratch'"):
            methods.named("scratch+kd")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
            ({"temperature": float("nan")}, "temperature=nan must be above 0"),
            ({"hard_weight": 0, "soft_weight": 0}, "leave kd nothing to learn"),
            ({"hard_weight": float("nan")}, "hard_weight=nan must be a finite number"),
            ({"soft_weight": float("inf")}, "soft_weight=inf must be a finite number"),
        ],
    )
    def test_kd_refuses_what_makes_no_sense(self, options, said):
        for make in (methods.kd, methods.KdOptions):
            with pytest.raises(ValueError, match=said):
                make(**options)

    def test_kd_takes_weights_outside_0_to_1_and_says_what_they_do(self):
        with pytest.warns(UserWarning, match="hard_weight=-0.5 is below 0: .*away from the labels"):
            method = methods.kd(hard_weight=-0.5, soft_weight=1.5)
        assert (method.hard_weight, method.terms[0].weight) == (-0.5, 1.5)
        with pytest.warns(UserWarning, match="soft_weight=-0.2 is below 0: .*away from the teacher"):
            methods.KdOptions(hard_weight=1.2, soft_weight=-0.2)

    @pytest.mark.parametrize(
        ("option", "value"),
        [("period", 0), ("escape_radius", -1.0), ("negative_curvature_ratio", -0.1), ("budget", -1)],
    )
    def test_sprkd_refuses_what_makes_no_sense(self, option, value):
        with pytest.raises(ValueError, match=option):
            methods.sprkd(**{**vars(methods.EscapeOptions()), option: value})

    def test_decide_the_description(self):
        same, *others = (
            (methods.kd(), methods.kd(4.0)),
            (methods.kd(), methods.kd(2.0)),
            (methods.kd(), methods.kd(soft_weight=0.8)),
            (methods.kd(), methods.kd(hard_weight=0.2)),
            (methods.crd(), methods.crd(0.7)),
            (methods.sprkd(), methods.sprkd(period=50)),
            (methods.perturbations(), methods.perturbations(radius=0.02)),
            (methods.ig_overlay(), methods.ig_overlay(opacity=0.4)),
            (methods.map_matching(), methods.map_matching(0.7)),
        )
        assert same[0].description == same[1].description
        assert all(a.description != b.description for a, b in others)
