"""Objects written down and made again: every kind of class, sharing, what is known, and what is refused."""

import copy
import functools
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orderppl.config import Builder, build, describe
from orderppl.errors import UserError
from orderppl.import_paths import import_path, locate

import config_objects as own


def round_trip(thing: object) -> object:
    """Through YAML text, as a run folder does."""
    return build(yaml.safe_load(yaml.safe_dump(describe(thing))))


def test_a_description_is_the_class_path_with_the_arguments_given() -> None:
    init_args = {"width": 4, "activation": "torch.nn.Tanh", "inner": None}
    assert describe(own.Network(4, nn.Tanh)) == {"class_path": "config_objects.Network", "init_args": init_args}
    assert describe(own.NoArguments()) == {"class_path": "config_objects.NoArguments"}
    given = {"low": 0.5, "names": ["a", "b"], "length": None}  # plain defaults too, which may change
    assert describe(own.Options(names=("a", "b")))["init_args"] == given


def test_the_outermost_constructor_counts() -> None:
    deep = own.Deep(3, inner=own.Plain(2))
    spec = describe(deep)
    assert spec["class_path"] == "config_objects.Deep"
    assert spec["init_args"] == {
        "layers": 3,
        "inner": {"class_path": "config_objects.Plain", "init_args": {"size": 2, "mode": "a"}},
    }
    made = round_trip(deep)
    assert isinstance(made, own.Deep)
    assert made.layer.in_features == 6
    assert isinstance(made.inner, own.Plain)


def test_an_object_met_twice_is_made_once() -> None:
    shared = own.Network(4)
    program = own.Program(shared, shared, num_steps=3, tags={"a": [1, 2.5, None]})
    spec = describe(program)
    assert spec["init_args"]["network"] is spec["init_args"]["other"]
    made = round_trip(program)
    assert made.network is made.other
    assert made.tags == {"a": [1, 2.5, None]}
    apart = round_trip(own.Program(own.Network(4), own.Network(4), num_steps=3))
    assert apart.network is not apart.other


def test_sharing_holds_across_a_dict_of_objects_and_across_makes() -> None:
    denoiser = own.Network(4)
    spec = describe({"denoiser": denoiser, "model": own.Program(denoiser, own.Network(2), 1)})
    both = build(spec)
    assert both["model"].network is both["denoiser"]
    builder = Builder()
    assert builder.make(spec["denoiser"]) is builder.make(spec["model"]).network


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_are_described_like_the_original(copied) -> None:
    for thing in (own.Deep(3, inner=own.Plain(2)), own.Options(low=0.25), own.Program(own.Plain(2), own.Plain(3), 5)):
        assert describe(copied(thing)) == describe(thing)


def test_a_deep_copy_shares_nothing_with_the_original() -> None:
    program = own.Program(own.Network(4), own.Network(4), num_steps=3)
    twin = copy.deepcopy(program)
    both = describe([program, twin])
    assert both[0] == both[1]
    assert both[0]["init_args"]["network"] is not both[1]["init_args"]["network"]


def test_functions_and_classes_are_named_by_their_path() -> None:
    graded = own.Graded(own.grade, "exact")
    assert describe(graded)["init_args"] == {"grade": "config_objects.grade", "either": "exact", "loose": None}
    made = round_trip(graded)
    assert made.grade is own.grade
    assert made.either == "exact"
    assert round_trip(own.Graded(own.grade, own.grade)).either is own.grade
    assert isinstance(round_trip(own.Network(2, nn.Tanh)).activation, nn.Tanh)
    assert describe(own.Network(2, nn.Tanh))["init_args"]["activation"] == "torch.nn.Tanh"


def test_a_partial_keeps_its_function_and_arguments() -> None:
    made = round_trip(functools.partial(torch.optim.AdamW, lr=0.25, betas=(0.5, 0.9)))
    optimizer = made(nn.Linear(2, 2).parameters())
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 0.25


def test_tensors_and_dtypes_are_written_as_plain_values() -> None:
    held = own.Held(torch.tensor([[0, 2], [1, -1]]), torch.bfloat16)
    made = round_trip(held)
    assert torch.equal(made.order, held.order)
    assert made.order.dtype is torch.int64
    assert made.dtype is torch.bfloat16
    with pytest.raises(UserError, match=r"^order: a tensor of 10000 numbers is too large"):
        describe(own.Held(torch.zeros(10000)))


def test_what_a_function_loads_names_the_function() -> None:
    loaded = own.load_network("tiny", width=6)
    assert describe(loaded) == {
        "class_path": "config_objects.load_network",
        "init_args": {"name": "tiny", "width": 6},
    }
    made = round_trip(loaded)
    assert made.name == "tiny"
    assert made.layer.in_features == 6
    wheel = own.Wheel.from_wheel("H")
    assert describe(wheel) == {"class_path": "config_objects.Wheel.from_wheel", "init_args": {"chain": "H"}}
    assert round_trip(wheel).chain == "H"


def test_torch_modules_are_described_from_their_attributes() -> None:
    assert describe(nn.Linear(2, 3, bias=False)) == {
        "class_path": "torch.nn.Linear",
        "init_args": {"in_features": 2, "out_features": 3, "bias": False},
    }
    assert round_trip(nn.Linear(2, 3)).bias is not None
    assert describe(torch.compile(own.Network(2), backend="eager")) == describe(own.Network(2))


def test_what_cannot_be_written_is_one_line_with_the_argument() -> None:
    with pytest.raises(UserError, match=r"^network\.size: Forgetful does not keep its argument 'size'; set self.size"):
        describe(own.Program(own.Forgetful(2), own.Plain(1), 1))
    with pytest.raises(UserError, match=r"^grade: .*<lambda>. cannot be imported by a name"):
        describe(own.Graded(lambda text: 0.0))
    with pytest.raises(UserError, match=r"^loose: nothing says that 'loose' is a function"):
        describe(own.Graded(own.grade, loose=own.grade))
    with pytest.raises(UserError, match=r"^parts: Many takes any number of them"):
        describe(own.Many(1, 2))
    with pytest.raises(TypeError, match="takes no arguments"):
        own.NoArguments(3)


def test_what_is_known_fills_in_what_is_not_given_at_every_depth() -> None:
    inner = {"class_path": "config_objects.Network"}
    spec = {"class_path": "config_objects.Program", "init_args": {"network": inner, "other": None}}
    known = {"num_steps": 7, "width": 5, "other": own.Plain(2), "length": 16, "low": 0.1}
    made = build(spec, known)
    assert (made.num_steps, made.network.layer.in_features, made.other) == (7, 5, known["other"])
    options = build("config_objects.Options", known)
    assert options.length == 16  # None by default: filled in
    assert options.low == 0.5  # a default of its own: kept
    assert build({**spec, "init_args": {"network": inner, "num_steps": 2}}, known).num_steps == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "config_objects.Network"}, r"guide\.width: Network needs it; give guide\.width"),
        (
            {"class_path": "config_objects.Network", "init_args": {"widht": 3}},
            r"guide\.widht: Network has no such argument; did you mean width\?",
        ),
        (
            {"class_path": "config_objects.Deep", "init_args": {"layers": 1, "inner": {"class_path": "no_module.X"}}},
            r"guide\.inner: there is no module 'no_module'",
        ),
        ({"class_path": "config_objects.Netwrok"}, r"guide: config_objects has no Netwrok; did you mean Network\?"),
        ({"class_path": "config_objects.Picky", "init_args": {"number": -1}}, r"guide\.number: must be positive"),
        (
            {"class_path": "config_objects.Picky", "init_args": {"number": 0}},
            r"guide: Picky cannot be made \(ZeroDivisionError: division by zero\)",
        ),
        ({"class_path": "config_objects.Picky", "number": 1}, r"guide\.number: stands beside class_path"),
        ({"class_path": "config_objects.Picky", "init_args": [1]}, r"guide: Picky with \[1\] makes no object"),
        ({"class_path": "a b.c"}, r"guide: 'a b\.c' is no import path"),
        ({"class_path": 3}, r"guide: 3 is no import path"),
    ],
)
def test_bad_descriptions_are_one_line_with_the_field(spec, message) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        build(spec, field="guide")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "config_objects.NoArguments"},
        {"class_path": "os.system", "init_args": {"command": "true"}},
        {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "owner/name", "model": "m"}},
        {"class_path": "torch.load", "init_args": {"f": "weights.pt"}},
        {"class_path": "torch.nn.modules.module.torch.load", "init_args": {"f": "weights.pt"}},
        {"class_path": "orderppl.config.sys.exit"},
        {"class_path": "orderppl.config.build", "init_args": {"spec": "config_objects.NoArguments"}},
        {"class_path": "functools.partial", "init_args": {"func": "os.system"}},
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "trust_remote_code": True}},
        [{"class_path": "config_objects.NoArguments"}],
    ],
)
def test_a_foreign_description_makes_only_what_is_ours(spec) -> None:
    with pytest.raises(UserError, match="trust_remote_code"):
        build(spec, trust=False)


def test_a_foreign_description_may_hold_modules_of_torch() -> None:
    spec = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    assert isinstance(build(spec, trust=False), nn.Linear)
    small = {"class_path": "orderppl.config.tensor", "init_args": {"data": [1, 2], "dtype": "int64"}}
    assert torch.equal(build(small, trust=False), torch.tensor([1, 2]))


def test_a_module_that_fails_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_syntax.py").write_text("def f(:\n")
    (tmp_path / "broken_import.py").write_text("import no_such_thing_here\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    for name, reason in (
        ("broken_syntax", "SyntaxError"),
        ("broken_import", "No module named 'no_such_thing_here'"),
        ("leaves", "SystemExit"),
    ):
        with pytest.raises(UserError, match=f"{name} cannot be imported .*{reason}"):
            locate(f"{name}.Thing")


def test_paths_are_the_shortest_public_ones() -> None:
    assert import_path(torch.optim.AdamW) == "torch.optim.AdamW"
    assert import_path(nn.TransformerEncoderLayer) == "torch.nn.TransformerEncoderLayer"
    assert import_path(os.path.join).endswith(".join")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
).filter(lambda value: not (isinstance(value, dict) and "class_path" in value))


@given(tags=st.dictionaries(st.text(max_size=5), plain, max_size=3), steps=st.integers())
def test_plain_arguments_come_back_as_they_were(tags, steps) -> None:
    made = build(describe(own.Program(nn.Identity(), nn.Identity(), steps, tags)))
    assert made.tags == tags
    assert made.num_steps == steps


def test_an_argument_to_be_called_may_miss_arguments_of_its_own() -> None:
    loop = own.Loop(functools.partial(torch.optim.AdamW, lr=0.25))
    spec = describe(loop)
    assert spec["init_args"]["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.25}}
    assert round_trip(loop).optimizer(nn.Linear(2, 2).parameters()).defaults["lr"] == 0.25
    assert round_trip(own.Loop()).optimizer is torch.optim.Adam
