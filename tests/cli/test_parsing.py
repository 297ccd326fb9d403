import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoConfig

from robtok import COMMANDS
from robustness_tokens.cli.commands import build_parser
from robustness_tokens.cli.parsing import GROUPS, _HelpFormatter
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from tests.support.command_line import parse_arguments


ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^\s*(?![A-Z])[^`|]*?(examples/train\.py|robtok (?P<name>[a-z-]+))(?= )")
REQUIRED = ["--base_model", "base", "--dataset", "data", "--output_dir", "out"]


def documents() -> str:
    """The text of all documents and examples, lines that go on joined."""
    paths = (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("examples/**/*.py"),
    )
    return "\n".join(path.read_text(encoding="utf-8") for path in paths).replace("\\\n", " ")


def documented_commands() -> list[str]:
    lines = {line.partition(" #")[0].strip() for line in documents().splitlines()}
    return sorted(line for line in lines if COMMAND.search(line))


@pytest.mark.parametrize("command", documented_commands())
def test_commands_of_the_documents_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    match = COMMAND.search(command)
    assert match is not None
    words = shlex.split(command[match.end() :])
    if words == ["..."]:
        words = REQUIRED
    build_parser(match["name"] or "train").parse(words)


def test_commands_named_in_the_documents_exist() -> None:
    named = set(re.findall(r"`robtok ([a-z-]+)", documents()))
    assert named
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_groups_and_explains_every_argument_with_its_default(name: str) -> None:
    parser = build_parser(name)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        if action.dest == "help":
            continue
        shown = " ".join(_HelpFormatter("")._get_help_string(action).split())
        assert re.fullmatch(r"[A-Za-z].{10,}[.]", shown), f"{action.dest}: a sentence, not {shown!r}"
        if not action.option_strings:
            continue
        assert action.required or "efault" in shown or "if None" in shown or action.nargs == 0, action.dest
        assert sum(action.dest in members for members in GROUPS.values()) == 1, f"{action.dest} has no group"
        longs = set(action.option_strings)
        assert longs == {spelling.replace("_", "-") for spelling in longs} | {
            option for option in longs if "_" in option
        }
        assert f"{action.option_strings[0]} " in text


@pytest.mark.parametrize("dash", ["_", "-"])
def test_names_are_spelt_with_underscores_or_hyphens(dash: str) -> None:
    words = [f"--base{dash}model", "b", "--dataset", "d", f"--output{dash}dir", "o", f"--no{dash}onednn"]
    model_args, _, args = parse_arguments(words)
    assert (model_args.base_model, args.output_dir, args.onednn) == ("b", "o", False)
    _, values = build_parser("push").parse(
        ["folder", "u/n", f"--base{dash}model{dash}id", "u/b", "--tag", "a", "--tag", "b"]
    )
    assert (values["base_model_id"], values["tag"], values["public"]) == ("u/b", ["a", "b"], False)
    _, values = build_parser("merge").parse(["a", "plain", f"--image{dash}size", "28", "--classifier"])
    assert values == {"adapter": "a", "output_dir": Path("plain"), "image_size": 28, "classifier": True}


def test_a_command_with_a_word_of_its_own_reads_a_file_after_it(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "dataset: d\noutput_dir: o\neps: [4/255, 8/255]\n")
    (args,), values = build_parser("evaluate").parse(["adapter", file, "--seed", "3"])
    assert values == {"adapter": "adapter"}
    assert (args.dataset, args.eps, args.seed) == ("d", [4 / 255, 8 / 255], 3)


@pytest.mark.parametrize(
    "words",
    [["--eps", "8/255"], ["--eps=8/255"], ["--eps", repr(8 / 255)]],
    ids=["two words", "one word", "decimal"],
)
def test_fractions_are_numbers(words: list[str]) -> None:
    _, _, args = parse_arguments([*REQUIRED, "--attack", "pgd", "--step_size", "1/255", *words])
    assert args.eps == 8 / 255
    assert args.step_size == 1 / 255


def test_a_folder_that_looks_like_a_fraction_stays_a_folder() -> None:
    model_args, data_args, args = parse_arguments(
        ["--base_model", "1/2", "--dataset", "3/4", "--output_dir", "2026/11"]
    )
    assert (model_args.base_model, data_args.dataset, args.output_dir) == ("1/2", "3/4", "2026/11")


@pytest.mark.parametrize("word", ["8/0", "eight", "1/2/3", "/255"])
def test_what_is_no_number_is_an_error(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([*REQUIRED, "--attack", "pgd", "--eps", word])
    assert "--eps" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--learning", "--lr", "--nonsense"])
def test_unknown_and_abbreviated_names_are_errors(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([*REQUIRED, word, "1"])
    assert word in capsys.readouterr().err


def test_out_of_range_values_are_errors_there_too() -> None:
    with pytest.raises(ValueError, match='attack="pgd"'):
        parse_arguments([*REQUIRED, "--eps", "8/255"])


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_yaml_file_and_words_that_win_over_it(tmp_path: Path) -> None:
    file = write_yaml(
        tmp_path,
        "base_model: base\n"
        "dataset: data\n"
        "output_dir: -odd- folder\n"
        "attack: pgd\n"
        "eps: 8/255\n"
        "learning_rate: 5e-2\n"
        "streaming: true\n"
        "overwrite_output_dir: false\n"
        "max_grad_norm:\n"
        "max_steps: 7\n",
    )
    model_args, data_args, args = parse_arguments([file, "--max_steps", "9", "--learning_rate", "0.5"])
    assert model_args.base_model == "base"
    assert (data_args.dataset, data_args.streaming) == ("data", True)
    assert (args.output_dir, args.attack, args.eps) == ("-odd- folder", "pgd", 8 / 255)
    assert (args.max_steps, args.learning_rate) == (9, 0.5)
    assert args.overwrite_output_dir is False
    assert args.max_grad_norm is None
    assert parse_arguments([file])[2].max_steps == 7
    assert parse_arguments([file])[2].learning_rate == 0.05


def test_values_of_a_file_are_taken_as_they_are_written(tmp_path: Path) -> None:
    """PyYAML reads YAML 1.1, in which 0123456 is 42798, 010 is 8, 1:30 is 90, and `no` is false."""
    text = "base_model: 1:30\nbase_model_revision: 0123456\ndataset: no\noutput_dir: 2026.10\nmax_steps: 010\n"
    model_args, data_args, args = parse_arguments(
        [write_yaml(tmp_path, text + "split: null\nseed: ~\nattack: 'pgd'\n")]
    )
    assert (model_args.base_model, model_args.base_model_revision) == ("1:30", "0123456")
    assert (data_args.dataset, args.output_dir, args.max_steps, args.attack) == ("no", "2026.10", 10, "pgd")
    assert (data_args.split, args.seed) == ("train", 0), "null means the default"


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([write_yaml(tmp_path, "learning: 0.1\n"), *REQUIRED])
    assert "learning=0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold a mapping.*got list"),
        ("", "must hold a mapping.*got NoneType"),
        ("a: [1\n", "can't be read as YAML"),
        ("dataset:\n  name: x\n", "dataset must be a plain value, got a dict"),
        ("dataset: [x, y]\n", "dataset must be a plain value, got a list"),
        ("max_steps: 7\nseed: 1\nmax_steps: 9\n", r"can't be read as YAML: the keys \['max_steps'\] occur twice"),
        ("dataset: !!python/name:os.system\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([write_yaml(tmp_path, text), *REQUIRED])


def test_a_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml can't be read"):
        parse_arguments([str(tmp_path / "none.yaml"), *REQUIRED])


def test_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(["--help"], prog="robtok train")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "usage: robtok train" in text
    assert all(f"--{field.name}" in text for field in dataclasses.fields(RobustnessTokenTrainingArguments))


def test_from_base_kwargs_are_from_bases_own() -> None:
    model_args, _, _ = parse_arguments([*REQUIRED, "--base_model_revision", "abc", "--num_robustness_tokens", "3"])
    assert model_args.from_base_kwargs() == {
        "num_robustness_tokens": 3,
        "token_depth": 1,
        "gains_and_shifts": [],
        "initializer_range": 0.01,
        "similarity_axis": "token",
        "revision": "abc",
    }


@pytest.mark.parametrize(("word", "depth"), [("all", "all"), ("6", 6), ("deep", "deep")])
def test_depth_gains_and_shifts_reach_from_base(word: str, depth: int | str) -> None:
    words = ["--token_depth", word, "--gains_and_shifts", "norm", "bias"]
    model_args, _, _ = parse_arguments([*REQUIRED, *words])
    assert model_args.from_base_kwargs()["token_depth"] == depth, "from_base refuses what is no depth"
    assert model_args.from_base_kwargs()["gains_and_shifts"] == ["norm", "bias"]


def test_a_preset_sets_what_the_user_does_not() -> None:
    model_args, _, args = parse_arguments([*REQUIRED, "--preset", "openclip", "--learning_rate", "0.5"])
    assert (args.max_steps, args.learning_rate, args.image_size) == (300, 0.5, 224)
    assert (model_args.feature_view, model_args.image_mean) == ("pooled", [0.485, 0.456, 0.406])
    assert model_args.from_base_kwargs()["image_std"] == [0.229, 0.224, 0.225]


@pytest.mark.parametrize(("model_type", "max_steps"), [("dinov2", 50), ("clip_vision_model", 300)])
def test_the_preset_paper_goes_by_the_family_of_the_base(model_type: str, max_steps: int, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    words = ["--base_model", str(tmp_path), *REQUIRED[2:], "--preset", "paper"]
    assert parse_arguments(words)[2].max_steps == max_steps


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of.*got 'papers'"):
        parse_arguments([*REQUIRED, "--preset", "papers"])


def test_lists_in_a_file(tmp_path: Path) -> None:
    model_args, _, _ = parse_arguments([write_yaml(tmp_path, "image_mean: [0.5, 0.4, 0.3]\n"), *REQUIRED])
    assert model_args.image_mean == [0.5, 0.4, 0.3]


def test_a_tilde_is_the_home_folder_on_the_command_line_and_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_yaml(tmp_path, "dataset: ~/data\nhead: ~/head\n")
    model_args, data_args, args = parse_arguments([file, "--base_model=~/base", "--output_dir=~/out"])
    found = (model_args.base_model, model_args.head, data_args.dataset, args.output_dir)
    assert found == tuple(f"{tmp_path}/{name}" for name in ("base", "head", "data", "out"))
    _, values = build_parser("merge").parse(["~/adapter", "~/plain"])
    assert (values["adapter"], values["output_dir"]) == (f"{tmp_path}/adapter", tmp_path / "plain")
    model_args, _, _ = parse_arguments(["--base_model=org/~name", "--dataset=d", "--output_dir=o"])
    assert model_args.base_model == "org/~name"


def test_columns_and_labels_are_told_to_both_commands() -> None:
    columns = ("--image_column_name", "photo", "--label_column_name", "fine", "--label_matching", "index")
    _, _, training_args = parse_arguments([*REQUIRED, *columns])
    (args,), _ = build_parser("evaluate").parse(
        ["adapter", "--dataset", "d", "--output_dir", "o", *columns, "--mask_column_name", "mask"]
    )
    for found in (training_args, args):
        told = (found.image_column_name, found.label_column_name, found.label_matching)
        assert told == ("photo", "fine", "index")
    assert args.mask_column_name == "mask"
