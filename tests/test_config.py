"""Settings: one declaration behind Python, flags, YAML and help."""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import typing

import pytest

from mlx_gemma4.config import (
    DataConfig,
    LoraConfig,
    Part,
    RunConfig,
    TrainConfig,
    build,
    flatten,
    read_yaml,
)
from mlx_gemma4.config.schema import _add_flags as add_flags
from mlx_gemma4.errors import ConfigError
from mlx_gemma4.train.__main__ import _settings

GROUPS = [RunConfig, DataConfig, TrainConfig, LoraConfig]
FIELDS = [(group, item) for group in GROUPS for item in dataclasses.fields(group)]
FIELD_IDS = [f"{group.__name__}.{item.name}" for group, item in FIELDS]


OWN_VALUES = {
    "train_parts": ["norms", "last-2-layers"],
    "lora_layers": "0-9,20",
    "lora_plus_ratio": 16.0,
    "rematerialize": "none",
    "resume": "auto",
    "report_to": ["wandb", "trackio"],
    "min_learning_rate": 5e-5,
}
BESIDE = {
    "train_parts": {"fine_tune_type": "full"},
    "embedding_learning_rate": {"fine_tune_type": "full"},
    "weight_decay": {"optimizer": "adamw"},
}
"""What a field needs of another, to be a setting at all."""


def key_of(group, item) -> str:
    return item.metadata["prefix"] + item.name


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for group in GROUPS:
        add_flags(parser, Part(group, group.__name__))
    return parser


def from_yaml(tmp_path, text: str):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return build(GROUPS, read_yaml(path), str(path))


def test_defaults():
    run, data, train, lora = build(GROUPS, {}, "nothing")
    assert (run.model, run.data, run.output, run.resume) == (None, None, None, None)
    assert (data.train_on, data.max_seq_length, data.overlong) == ("assistant", 2048, "skip")
    assert (train.fine_tune_type, train.iters, train.epochs) == ("lora", None, None)
    assert (train.batch_size, train.grad_accumulation_steps) == (1, 1)
    assert (train.learning_rate, train.lr_schedule, train.warmup_steps) == (1e-4, "constant", 0)
    assert (train.seed, train.rematerialize, train.val_batches) == (0, "auto", None)
    assert (lora.rank, lora.alpha, lora.dropout, lora.num_layers) == (8, 16.0, 0.0, -1)
    assert lora.targets == ("attention", "mlp")


def test_scale_is_alpha_over_rank():
    assert LoraConfig(rank=4, alpha=6).scale == 1.5


def test_numbers_take_the_declared_type():
    config = LoraConfig(alpha=6, targets=["q_proj"])
    assert isinstance(config.alpha, float)
    assert config.targets == ("q_proj",)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_settings_are_frozen(group):
    item = dataclasses.fields(group)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(group(), item.name, None)


def test_an_unknown_key_suggests_the_near_one(tmp_path):
    with pytest.raises(ConfigError) as error:
        from_yaml(tmp_path, "learning_rat: 0.1\n")
    message = str(error.value)
    assert "unknown key 'learning_rat' in" in message
    assert "settings.yaml" in message
    assert "did you mean 'learning_rate'?" in message


def test_an_unknown_key_like_no_other_lists_them_all(tmp_path):
    with pytest.raises(ConfigError) as error:
        from_yaml(tmp_path, "zzz: 1\n")
    assert error.value.do == "remove it"
    for group, item in FIELDS:
        assert key_of(group, item) in error.value.wanted


def test_a_lora_field_without_its_prefix_is_unknown(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'lora_alpha'"):
        from_yaml(tmp_path, "alpha: 3\n")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("batch_size: four", "a whole number"),
        ("batch_size: 2.5", "a whole number"),
        ("batch_size: true", "a whole number"),
        ("batch_size: null", "a whole number"),
        ("iters: '10'", "a whole number"),
        ("learning_rate: fast", "a number"),
        ("learning_rate: true", "a number"),
        ("learning_rate: [1]", "a number"),
        ("learning_rate: null", "a number"),
        ("packing: 1", "true or false"),
        ("resume: 'yes'", "one of always, auto"),
        ("train_on: everything", "one of assistant, last, all, completion"),
        ("train_on: [last]", "one of assistant, last, all, completion"),
        ("fine_tune_type: dora", "one of lora, full"),
        ("lora_targets: 3", "a list of names"),
        ("lora_targets: [q_proj, 3]", "a list of names"),
        ("model: 4", "text"),
        ("data: [a, b]", "text"),
    ],
)
def test_a_wrong_type_in_yaml_names_key_and_wanted_type(tmp_path, line, wanted):
    key = line.split(":")[0]
    with pytest.raises(ConfigError) as error:
        from_yaml(tmp_path, line + "\n")
    assert error.value.found.startswith(f"{key} is ")
    assert error.value.wanted == wanted
    assert error.value.do == f"change {key}"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "'0.0001'", "0.0001"])
def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path, text):
    _, _, train, _ = from_yaml(tmp_path, f"learning_rate: {text}\n")
    assert train.learning_rate == 1e-4


@pytest.mark.parametrize(
    "text", ["q_proj, v_proj", "q_proj v_proj", "[q_proj, v_proj]", "['q_proj,v_proj']"]
)
def test_targets_in_yaml_are_a_list_or_one_line(tmp_path, text):
    *_, lora = from_yaml(tmp_path, f"lora_targets: {text}\n")
    assert lora.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("group", "name", "value", "wanted"),
    [
        (TrainConfig, "batch_size", 0, "1 or more"),
        (TrainConfig, "iters", 0, "1 or more"),
        (TrainConfig, "epochs", 0.0, "above 0.0"),
        (TrainConfig, "epochs", -0.5, "above 0.0"),
        (TrainConfig, "grad_accumulation_steps", 0, "1 or more"),
        (TrainConfig, "learning_rate", -1e-4, "0.0 or more"),
        (TrainConfig, "learning_rate", float("nan"), "0.0 or more"),
        (TrainConfig, "epochs", float("nan"), "above 0.0"),
        (TrainConfig, "warmup_steps", -1, "0 or more"),
        (TrainConfig, "seed", -1, "0 or more"),
        (TrainConfig, "save_every", 0, "1 or more"),
        (DataConfig, "max_seq_length", 1, "2 or more"),
        (LoraConfig, "rank", 0, "1 or more"),
        (LoraConfig, "alpha", -1.0, "above 0.0"),
        (LoraConfig, "alpha", float("nan"), "above 0.0"),
        (LoraConfig, "dropout", -0.1, "0.0 or more"),
        (LoraConfig, "dropout", 1.0, "below 1"),
        (LoraConfig, "num_layers", -2, "-1 or more"),
    ],
)
def test_bounds(group, name, value, wanted):
    with pytest.raises(ConfigError) as error:
        group(**{name: value})
    prefix = "lora_" if group is LoraConfig and name != "num_layers" else ""
    assert error.value.found == f"{prefix}{name} is {value}"
    assert error.value.wanted == wanted


@pytest.mark.parametrize("name", ["epochs", "learning_rate"])
def test_infinity_is_no_setting(name):
    with pytest.raises(ConfigError, match=f"{name} is inf"):
        TrainConfig(**{name: float("inf")})


def test_no_target_at_all_is_refused():
    with pytest.raises(ConfigError, match="lora_targets is empty"):
        LoraConfig(targets=())


def test_layers_by_number_and_number_of_layers_exclude_each_other():
    with pytest.raises(ConfigError, match="lora_layers is 0-3 and num_layers is 2"):
        LoraConfig(layers="0-3", num_layers=2)


@pytest.mark.parametrize("layers", ["", "3-1", "-2", "1-", "a", "1;2", "0-3,", "1.5"])
def test_layers_that_are_none(layers):
    with pytest.raises(ConfigError, match=r"lora_layers is .*\n.*such as 0-9,20"):
        LoraConfig(layers=layers)


def test_iters_and_epochs_exclude_each_other():
    with pytest.raises(ConfigError) as error:
        TrainConfig(iters=5, epochs=2)
    assert error.value.found == "iters is 5 and epochs is 2.0"
    assert error.value.do == "leave out iters or epochs"


@pytest.mark.parametrize(("group", "item"), FIELDS, ids=FIELD_IDS)
def test_every_field_has_a_flag_with_help_and_a_yaml_key(group, item, tmp_path):
    key = key_of(group, item)
    actions = {option: action for action in parser()._actions for option in action.option_strings}
    action = actions["--" + key.replace("_", "-")]
    assert action.dest == key
    assert len(action.help) > 10
    default = item.default
    if default not in (None, True, False) and not isinstance(default, tuple):
        assert f"(default: {default})" in action.help
    config = group()
    assert flatten(config)[key] == (list(default) if isinstance(default, tuple) else default)
    assert build([group], {key: default}, "a test") == (config,)


@pytest.mark.parametrize(("group", "item"), FIELDS, ids=FIELD_IDS)
def test_a_flag_and_its_yaml_key_set_the_same_field(group, item, tmp_path):
    key, hint = key_of(group, item), typing.get_type_hints(group)[item.name]
    flag = "--" + key.replace("_", "-")
    values = {bool: not item.default, float: 0.5, str: "there"}
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(kinds[0]) is typing.Literal:
        hint, kinds = kinds[0], typing.get_args(kinds[0])
    if typing.get_origin(hint) is typing.Literal:
        value = next(kind for kind in kinds if kind != item.default)
    elif typing.get_origin(hint) is tuple:
        value = ["o_proj", "up_proj"]
    elif typing.get_origin(kinds[0]) is collections.abc.Mapping:
        value = ["q_proj=3", "layers.0.mlp.up_proj=4"]
    else:
        value = values.get(kinds[0], 7)
    value = OWN_VALUES.get(key, value)
    words = [*value] if isinstance(value, list) else [str(value)]
    if isinstance(value, bool):
        flag, words = flag if value else "--no-" + flag[2:], []
    beside = BESIDE.get(key, {})
    given = vars(parser().parse_args([flag, *words]))
    assert given == {key: value}
    (by_flag,) = build([group], given | beside, "flags")
    by_yaml = from_yaml(
        tmp_path,
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}\n"
        + "".join(f"{name}: {other}\n" for name, other in beside.items()),
    )
    assert by_flag == by_yaml[GROUPS.index(group)]
    assert by_flag != group()


@pytest.mark.parametrize("words", [["q_proj,v_proj"], ["q_proj,", "v_proj"], ["q_proj, v_proj"]])
def test_lists_on_the_command_line_may_have_commas(words):
    given = vars(parser().parse_args(["--lora-targets", *words]))
    assert build([LoraConfig], given, "flags")[0].targets == ("q_proj", "v_proj")


def test_pairs_on_the_command_line_may_have_commas():
    """A comma within a name stays."""
    given = vars(parser().parse_args(["--columns", "prompt=my question,completion=b", "x=c, d"]))
    (data,) = build([DataConfig], given, "flags")
    assert data.columns == {"prompt": "my question", "completion": "b", "x": "c, d"}


def test_flags_that_are_not_given_leave_no_value():
    assert vars(parser().parse_args([])) == {}


def test_a_boolean_can_be_taken_back_by_a_flag():
    assert parser().parse_args(["--no-packing"]).packing is False


def test_a_flag_wins_over_yaml_and_yaml_over_the_default(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("batch_size: 2\nseed: 5\nlora_rank: 3\npacking: true\n")
    arguments = "--model m --data d --output o --seed 9 --lora-targets q_proj --no-packing"
    run, data, train, lora, _ = _settings(["--config", str(path), *arguments.split()])
    assert (train.seed, train.batch_size, train.packing) == (9, 2, False)
    assert (lora.rank, lora.targets, lora.alpha) == (3, ("q_proj",), 16.0)
    assert (run.model, data) == ("m", DataConfig())


def test_yaml_may_name_model_data_and_output(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("model: m\ndata: d\noutput: o\n")
    run, *_ = _settings(["-c", str(path)])
    assert run == RunConfig(model="m", data="d", output="o")


def test_without_a_model_the_embedded_settings_are_the_defaults(tmp_path):
    from mlx_gemma4.train.embedded import DEFAULTS

    _, data, train, lora, _ = _settings(["--output", "o", "--batch-size", "3"])
    assert (train.iters, train.batch_size) == (DEFAULTS["iters"], 3)
    assert (data.max_seq_length, lora.rank) == (DEFAULTS["max_seq_length"], DEFAULTS["lora_rank"])


def test_epochs_take_the_place_of_the_embedded_iters():
    _, _, train, *_ = _settings(["--output", "o", "--epochs", "0.5"])
    assert (train.iters, train.epochs) == (None, 0.5)


def test_iters_and_epochs_exclude_each_other_without_a_model_too():
    with pytest.raises(ConfigError, match="iters is 5 and epochs is"):
        _settings(["--output", "o", "--epochs", "0.5", "--iters", "5"])


def test_flatten_and_build_are_a_round_trip():
    settings = (
        RunConfig(model="m", data="d", output="o", resume="auto"),
        DataConfig(train_on="last", max_seq_length=77, overlong="skip"),
        TrainConfig(epochs=1.5, batch_size=3, learning_rate=3e-5, lr_schedule="cosine"),
        LoraConfig(rank=3, alpha=4.5, dropout=0.25, targets=("experts", "o_proj"), num_layers=2),
    )
    assert build(GROUPS, flatten(*settings), "a round trip") == settings


def test_flattened_settings_survive_yaml(tmp_path):
    import yaml

    settings = (TrainConfig(learning_rate=1e-5), LoraConfig(rank=2, targets=("q_proj",)))
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(flatten(*settings)))
    assert build([TrainConfig, LoraConfig], read_yaml(path), str(path)) == settings


def test_an_empty_yaml_file_sets_nothing(tmp_path):
    assert from_yaml(tmp_path, "# nothing yet\n") == build(GROUPS, {}, "nothing")


def test_a_yaml_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path / "none.yaml")
    assert "none.yaml" in error.value.found
    assert error.value.do == "check the path"


@pytest.mark.parametrize("text", ["batch_size: [1\n", "a: b: c\n", "\tseed: 1\n", "? [a]\n: 1\n"])
def test_a_file_that_is_not_yaml(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"settings.yaml is not YAML: (?s:.*)mend the file"):
        read_yaml(path)


def test_a_yaml_file_that_is_not_text(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"seed: \xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "kind"), [("- seed\n", "list"), ("seed\n", "str"), ("3\n", "int")]
)
def test_yaml_that_is_no_mapping(tmp_path, text, kind):
    with pytest.raises(ConfigError) as error:
        from_yaml(tmp_path, text)
    assert f"holds a {kind}" in error.value.found
    assert error.value.wanted == "lines of `key: value`"


def test_yaml_keys_that_are_not_text_are_unknown(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 1"):
        from_yaml(tmp_path, "1: 2\n")


def test_a_word_that_is_a_number_may_be_one_in_yaml(tmp_path):
    run = from_yaml(tmp_path, "quantize: 4\n")[GROUPS.index(RunConfig)]
    assert run.quantize == "4"
    with pytest.raises(ConfigError, match="quantize is 7"):
        from_yaml(tmp_path, "quantize: 7\n")
