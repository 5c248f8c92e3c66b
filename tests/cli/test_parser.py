"""Command lines and YAML files into plain values: any class at any depth, and one line for whatever is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import small_classes
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orderppl.cli.parser import parse, presets, restore_sharing
from orderppl.config import build
from orderppl.documents import LARGEST, dump_yaml, parse_yaml, read_yaml
from orderppl.errors import UserError

PART = "small_classes.Part"


def read(*arguments: str) -> Any:
    return parse(small_classes.Config, arguments, "small")


def error_of(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_classes_are_chosen_by_path_at_any_depth() -> None:
    inner = ["--part.inner", PART, "--part.inner.width", "7", "--part.inner.inner", PART, "--part.inner.inner.width=9"]
    part = read("--part", PART, "--part.width", "32", *inner).part
    assert part["class_path"] == PART
    assert part["init_args"]["width"] == 32
    assert part["init_args"]["inner"]["init_args"]["inner"]["init_args"]["width"] == 9
    made = build(part, {"vocab_size": 11})
    assert made.inner.inner.vocab_size == 11


def test_what_a_run_knows_is_not_required_and_may_be_given() -> None:
    assert read("--part", PART, "--part.width", "1").part["init_args"]["vocab_size"] is None
    assert read("--part", PART, "--part.width", "1", "--part.vocab_size", "5").part["init_args"]["vocab_size"] == 5


def test_anything_may_stand_for_a_protocol() -> None:
    for spec, arguments in (
        (
            {"class_path": "small_classes.MyReader", "init_args": {"size": 4}},
            ["small_classes.MyReader", "--reader.size=4"],
        ),
        (
            {"class_path": "small_classes.load_reader", "init_args": {"path": "x", "strict": True}},
            ["small_classes.load_reader", "--reader.path", "x", "--reader.strict", "true"],
        ),
    ):
        assert read("--part", PART, "--part.width", "1", "--reader", *arguments).reader == spec


def test_every_kind_of_annotation_is_read() -> None:
    duck = {
        "class_path": "small_classes.Duck",
        "init_args": {
            "reader": {"class_path": "small_classes.MyReader"},
            "price": {"class_path": PART, "init_args": {"width": 3}},
            "grade": "small_classes.grade",
            "order": [[0, 1], [2, 3]],
            "anything": {"x": [1]},
            "dtype": "torch.float64",
            "sizes": [3],
            "parts": [{"class_path": PART, "init_args": {"width": 4}}],
            "kind": "torch.nn.Tanh",
            "untyped": "text",
        },
    }
    found = read("--part", json.dumps(duck)).part["init_args"]
    assert found["price"]["init_args"]["width"] == 3
    assert found["parts"][0]["init_args"]["width"] == 4
    for name in ("grade", "order", "anything", "dtype", "sizes", "kind", "untyped"):
        assert found[name] == duck["init_args"][name]
    defaults = read("--part", "small_classes.Duck", "--part.reader", "small_classes.MyReader").part["init_args"]
    assert (defaults["dtype"], defaults["kind"], defaults["sizes"]) == ("torch.float32", "torch.nn.GELU", [1, 2])


def test_names_of_orderppl_and_torch_need_no_path() -> None:
    found = read("--part", PART, "--part.width", "1", "--fit.optimizer", "AdamW", "--fit.optimizer.lr", "0.5")
    assert found.fit["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert found.fit["optimizer"]["init_args"]["lr"] == 0.5
    assert read("--part", "PolicyNetwork").part["class_path"] == "orderppl.models.PolicyNetwork"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", PART], "part.width: is required; give --part.width"),
        (["--part", PART, "--part.widht", "3"], "part.widht: no such option; did you mean width?"),
        (["--part", PART, "--part.width", "x"], "part.width: must be int, got 'x'; see --help"),
        (["--part", PART, "--part.width", "1", "--part.mode", "c"], "part.mode: must be a or b, got 'c'; see --help"),
        (
            ["--part", PART, "--part.width", "1", "--part.inner", PART, "--part.inner.width", "1.5"],
            "part.inner.width: must be int, got '1.5'; see --help",
        ),
        (["--part", "small_classes.Prat"], "part: small_classes has no Prat; did you mean Part?"),
        (
            ["--part", "no_such.Part"],
            "part: there is no module 'no_such'; put it into the current folder, or install it",
        ),
        (
            ["--part", "PolicyNetwrok"],
            "part: no class of orderppl is called 'PolicyNetwrok'; did you mean PolicyNetwork?",
        ),
        (["--num_step", "3"], "num_step: no such option; did you mean num_steps?"),
        (["--part", PART, "--part.width", "1", "--fit.updates", "many"], "fit.updates: must be int, got 'many'"),
        (["--part", PART, "--part.width", "1", "--fit.rates", "x"], "fit.rates: must be float or dict, got 'x'"),
        ([], "part: is required; give --part"),
        (["--config", "nowhere"], "--config: no file 'nowhere'; give a path, or one of: "),
        (["--config"], "--config: no file ''"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_field(arguments: list[str], message: str) -> None:
    assert error_of(*arguments).startswith(message)


def test_a_module_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_to_load.py").write_text("import not_installed_here\n")
    (tmp_path / "raises_at_once.py").write_text("1 / 0\n")
    assert "fails_to_load cannot be imported (No module named 'not_installed_here')" in error_of(
        "--part", "fails_to_load.P"
    )
    assert "raises_at_once cannot be imported (ZeroDivisionError" in error_of("--part", "raises_at_once.P")


def test_switches_and_names_without_dashes() -> None:
    found = read("a", "b c", "--part", PART, "--part.width", "1", "--resume", "--fit.progress", "false")
    assert found.names == ["a", "b c"]
    assert found.resume is True
    assert found.fit["progress"] is False
    assert read("--part", PART, "--part.width", "1", "--names", "[x, y]").names == ["x", "y"]


@pytest.mark.parametrize(
    "text", ["5", "a: b", "[MASK]", "[a, b]", "- x", "{", "'q'", "x # y", "", "~", "true", "--dashes"]
)
def test_texts_are_taken_as_they_are(text: str) -> None:
    from orderppl.cli.generate import Config

    config = parse(Config, ["runs/one", f"--prompt={text}", "--prompt", "two", f"--template={text}"], "generate")
    assert config is not None
    assert (config.prompt, config.template, config.run) == ([text, "two"], [text], "runs/one")


# ---- files


def test_a_file_and_options_together(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"\ufeffpart: {{class_path: {PART}, init_args: {{width: 3}}}}\nfit: {{updates: 5, rates: 1e-3}}\n")
    found = read("--config", str(file), "--part.rate", "0.25", "--fit.updates", "6")
    assert found.part["init_args"]["width"] == 3
    assert found.part["init_args"]["rate"] == 0.25
    assert (found.fit["updates"], found.fit["rates"]) == (6, 0.001)
    second = tmp_path / "second.yaml"
    second.write_text("num_steps: 9\n")
    both = read("--config", str(file), "--config", str(second))
    assert (both.num_steps, both.part["init_args"]["width"]) == (9, 3)


def test_what_is_one_object_in_a_file_stays_one(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"part: &part {{class_path: {PART}, init_args: {{width: 3, inner: &inner {{class_path: {PART}, "
        "init_args: {width: 4}}}}\n"
        "reader: {class_path: small_classes.Duck, init_args: {reader: *inner}}\n"
    )
    found = read("--config", str(file))
    assert found.part["init_args"]["inner"] is found.reader["init_args"]["reader"]
    text = dump_yaml(vars(found))
    assert (
        parse_yaml(text)["part"]["init_args"]["inner"] is parse_yaml(text)["part"]["init_args"]["inner"]
        or "&id" in text
    )
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert vars(read("--config", str(again))) == vars(found)
    assert "is one object with part.init_args.inner in the file" in error_of(
        "--config", str(file), "--part.inner.width=5"
    )


def test_a_printed_config_is_complete_and_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--part", PART, "--part.width", "3", "--reader", "small_classes.MyReader"]
    assert read(*arguments, "--print_config") is None
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert list(values) == ["part", "reader", "num_steps", "fit", "names", "grids", "resume", "out"]
    assert values["part"]["init_args"]["mode"] == "a"
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert vars(read("--config", str(file))) == vars(read(*arguments))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("part: 1\npart: 2\n", "'part' comes twice"),
        ("fit: {updates: 1, updates: 2}\n", "'updates' comes twice"),
        ("a: &a [*a]\n", "nested too deep"),
        ("[" * 5000, "too deep"),
        ("a: " + "9" * 5000, "limit"),
        ("a: !!python/object/apply:os.system [true]\n", "no valid YAML at line 1"),
        ("a: !!binary aGk=\n", "holds a bytes"),
        ("1: 2\n", "1 is no name"),
        ("- 1\n", "holds a list"),
        ("a: {b: [}\n", "no valid YAML at line 1"),
        ("a: '\x00'\n", "no valid YAML"),
        ("x: " + "y" * LARGEST, "too many"),
        ("no_such_option: 3\n", "no such option"),
        ("fit: {no_such: 3}\n", "no_such"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert reason in error_of("--config", str(file), "--part", PART, "--part.width", "1")


def test_aliases_do_not_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="too many values"):
        read_yaml(file)
    file.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(file)


def test_an_empty_file_is_no_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("# nothing\n")
    assert read("--config", str(file), "--part", PART, "--part.width", "1").num_steps == 4


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(-(10**9), 10**9),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    names=st.lists(st.text(max_size=6), max_size=3),
    grid=st.dictionaries(
        st.text(max_size=4), st.lists(st.integers() | st.text(max_size=4) | st.booleans(), max_size=3)
    ),
)
@example(width=1, rate=1e-5, names=["0E0", "1e5", "1.5", "no", "2026-01-01"], grid={"1e3": ["1e3", True, 2]})
def test_values_come_through_a_file_unchanged(tmp_path: Path, width, rate, names, grid) -> None:
    written = {
        "part": {"class_path": PART, "init_args": {"width": width, "rate": rate}},
        "names": names,
        "grids": [grid],
    }
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(written), encoding="utf-8")
    found = read("--config", str(file))
    assert (found.part["init_args"]["width"], found.part["init_args"]["rate"]) == (width, rate)
    assert (found.names, found.grids) == (names, [grid])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(max_size=12) | st.sampled_from(["--part", PART, "--part.width", "--fit", "--config", "{}"]), max_size=5
    )
)
def test_no_command_line_ends_in_anything_but_one_line(arguments: list[str]) -> None:
    try:
        read(*arguments)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_sharing_is_restored_where_the_values_have_it() -> None:
    inner = {"class_path": "x.Y"}
    document = {"a": inner, "b": {"c": inner}, "d": [inner]}
    values: dict[str, Any] = {"a": {"class_path": "x.Y"}, "b": {"c": {"class_path": "x.Y"}}, "d": None}
    restore_sharing(document, values)
    assert values["a"] is values["b"]["c"]


# ---- help


def test_help_is_made_of_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("--help") is None
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in ("A command for tests.", "--num_steps", "how many.", "--fit.updates", "default: 10", "--part.help"):
        assert words in text
    assert read("--part.help", PART) is None
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in ("--part.width WIDTH", "of the hidden vectors.", "{a,b}", "default: 0.5", "what a run knows"):
        assert words in text


def test_packaged_configs_read_as_they_are() -> None:
    from importlib import import_module

    assert len(presets()) > 10
    for name, path in presets().items():
        command = re.match(r"# ([a-z-]+): ", path.read_text())
        assert command is not None, path
        kind = import_module(f"orderppl.cli.{command[1].replace('-', '_')}").Config
        assert parse(kind, ["--config", name], command[1]) is not None
