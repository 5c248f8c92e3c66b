from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from orderppl.errors import UserError
from orderppl.experiments.config import (
    RunConfig,
    build_config,
    config_dict,
    dump_config,
    identity_dict,
    load_config,
    packaged_configs,
    setting,
)


@dataclass(frozen=True)
class Sphere:
    name: Literal["sphere"] = "sphere"
    radius: float = setting(1.0, "metres", above=0)


@dataclass(frozen=True)
class Shell:
    name: Literal["shell"] = "shell"
    inside: Sphere | Shell = setting(Sphere, "what it is around")
    thickness: float = 0.1


@dataclass(frozen=True)
class Loop:
    updates: int = setting(10, "updates", at_least=1)
    learning_rate: float = setting(0.1, "per update", above=0, below=1)
    clip: float | None = setting(None, "largest gradient norm", above=0)

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip < self.learning_rate:
            raise UserError("clip", "is below the learning rate", "raise it")


@dataclass(frozen=True)
class Settings(RunConfig):
    shape: Sphere | Shell = setting(Sphere, "shape")
    loop: Loop = setting(Loop, "loop")
    steps: tuple[int, ...] = setting((4,), "step budgets", at_least=1)
    data: str | None = setting(None, "a file", file=True)
    flag: bool = False


def test_defaults_file_set_and_options_apply_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 1\nloop: {updates: 20, learning_rate: 1e-3}\nshape: shell\n")
    assert load_config(Settings, file).loop == Loop(20, 0.001)
    changes = ["loop.updates=30", "seed=2", "shape.inside={name: sphere, radius: 3}"]
    read = load_config(Settings, file, changes, {"seed": 5})
    assert (read.seed, read.loop.updates, read.loop.learning_rate) == (5, 30, 0.001)
    assert read.shape == Shell(inside=Sphere(radius=3.0))
    assert load_config(Settings) == Settings()


def test_one_line_swaps_a_part_by_name() -> None:
    assert load_config(Settings, None, ["shape=shell"]).shape == Shell()
    nested = load_config(Settings, None, ["shape={name: shell, inside: {name: shell, inside: sphere}}"])
    assert nested.shape == Shell(inside=Shell(inside=Sphere()))
    assert load_config(Settings, None, ["shape=shell", "shape.thickness=2"]).shape == Shell(thickness=2.0)


def test_a_dumped_config_reads_back_equal() -> None:
    config = load_config(Settings, None, ["shape=shell", "steps=[5, 10]", "loop.clip=2", "flag=true"])
    assert build_config(Settings, yaml.safe_load(dump_config(config))) == config
    assert config_dict(config)["steps"] == [5, 10]


@pytest.mark.parametrize(
    ("assignment", "field", "said"),
    [
        ("loop.updtes=3", "loop.updtes", "did you mean updates?"),
        ("lop.updates=3", "lop", "did you mean loop?"),
        ("loop.updates=0", "loop.updates", "at least 1"),
        ("loop.updates=2.5", "loop.updates", "whole number"),
        ("loop.updates=true", "loop.updates", "whole number"),
        ("loop.updates=many", "loop.updates", "whole number"),
        ("loop.learning_rate=0", "loop.learning_rate", "above 0"),
        ("loop.learning_rate=1", "loop.learning_rate", "below 1"),
        ("loop.learning_rate=.nan", "loop.learning_rate", "finite"),
        ("loop.clip=0.01", "loop.clip", "below the learning rate"),
        ("loop=3", "loop", "group of settings"),
        ("shape=spere", "shape", "did you mean sphere?"),
        ("shape.radius=2", "shape", "must name one of its kinds"),
        ("shape={name: sphere, thickness: 1}", "shape.thickness", "known: name, radius"),
        ("shape={name: shell, inside: {name: sphere, radius: -1}}", "shape.inside.radius", "above 0"),
        ("steps=[4, 0]", "steps", "at least 1"),
        ("steps=[4, a]", "steps[1]", "whole number"),
        ("dtype=float16", "dtype", "did you mean"),
        ("flag=1", "flag", "true or false"),
        ("data=/no/such/file", "data", "no such file"),
        ("seed=-1", "seed", "at least 0"),
        ("seed", "--set", "name=value"),
        ("seed.x=1", "seed", "whole number"),
        ("seed=[1", "seed", "YAML"),
    ],
)
def test_bad_settings_name_the_field_and_the_remedy(assignment: str, field: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(Settings, None, [assignment])
    assert error.value.field == field
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_config_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        load_config(Settings, tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("seed: 1\nloop: [1\n")
    with pytest.raises(UserError, match="not valid YAML at line"):
        load_config(Settings, broken)
    broken.write_text("- 1\n")
    with pytest.raises(UserError, match="holds a list"):
        load_config(Settings, broken)


def test_packaged_configs_are_found_by_name() -> None:
    folder = Path(__file__).parents[2] / "experiments" / "configs"
    assert set(packaged_configs()) == {path.stem for path in folder.glob("*.yaml")}


def test_items_of_lists_are_set_by_number_or_all_at_once(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Many(RunConfig):
        loops: tuple[Loop, ...] = setting((), "loops")

    globals()["Many"] = Many
    file = tmp_path / "many.yaml"
    file.write_text("loops: [&one {updates: 1}, *one, {<<: *one, clip: 0.5}]\n")
    read = load_config(Many, file, ["loops.1.updates=7", "loops.*.learning_rate=0.2"])
    assert read.loops == (Loop(1, 0.2), Loop(7, 0.2), Loop(1, 0.2, 0.5))  # what was one alias is set one by one
    for wrong in ("loops.3.updates=1", "loops.x.updates=1"):
        with pytest.raises(UserError, match=r"the list has 3 items; write 0 to 2, or \* for all"):
            load_config(Many, file, [wrong])


def test_a_file_is_another_one_with_changes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 3\nloop: {updates: 20}\nshape: shell\n")
    second.write_text(f"base: {first}\nset:\n  loop.updates: 5\n  shape.thickness: 2.0\n")
    assert load_config(Settings, second, ["loop.clip=3"]) == Settings(
        seed=3, loop=Loop(5, clip=3.0), shape=Shell(thickness=2.0)
    )
    second.write_text(f"base: {first}\nseed: 1\n")
    with pytest.raises(UserError, match="has a base; write its changes under `set:`"):
        load_config(Settings, second)


def test_settings_that_results_do_not_depend_on_are_no_part_of_the_identity() -> None:
    @dataclass(frozen=True)
    class Machine:
        rows: int = 1
        pieces: int = setting(1, "pieces", alters=False)

    @dataclass(frozen=True)
    class Whole:
        machines: tuple[Machine, ...] = (Machine(), Machine(2, 3))

    assert identity_dict(Whole()) == {"machines": [{"rows": 1}, {"rows": 2}]}
