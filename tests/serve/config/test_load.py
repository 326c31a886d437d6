from __future__ import annotations

from dataclasses import fields

import pytest

from serve.config import Config, engine_options, keys_hashed, load, settings
from serve.errors import ConfigError


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path):
    file = tmp_path / "loradock.yaml"
    file.write_text("port: 1\ngrace_period: 2\nlog_level: debug\nengine:\n  max_loras: 3\n  max_model_len: 64\n")
    environ = {"LORADOCK_PORT": "4", "LORADOCK_GRACE_PERIOD": "5", "LORADOCK_MAX_LORAS": "6"}
    config = load(["--config", str(file), "--port", "7"], environ)
    assert (config.port, config.grace_period, config.log_level) == (7, 5.0, "debug")
    assert dict(config.engine) == {"max_loras": "6", "max_model_len": 64}


def test_every_option_of_the_engine_is_a_setting():
    arguments = ["m", "--max-model-len=64", "--enforce-eager", "--no-enable-prefix-caching", "--quantization", "fp8"]
    config = load(arguments, {"LORADOCK_DTYPE": "float32"})
    assert dict(config.engine) == {
        "max_model_len": "64",
        "enforce_eager": "true",
        "enable_prefix_caching": "false",
        "quantization": "fp8",
        "dtype": "float32",
    }
    assert len(engine_options()) > 150


def test_a_target_is_a_number_of_seconds_or_left_to_the_server(tmp_path):
    file = tmp_path / "loradock.yaml"
    file.write_text("target_inter_token: 0.00001\n")
    assert load([], {}).target_inter_token == "auto"
    assert float(load(["--config", str(file)], {}).target_inter_token) == 0.00001
    for word in ("0", "0.25", ".1", "1e-1", "auto"):
        assert load(["--target-inter-token", word], {}).target_inter_token == word


def test_a_switch_does_not_swallow_the_model_behind_it():
    assert load(["--enforce-eager", "my-model"], {}).model == "my-model"


A, B, C = (letter * 16 for letter in "abc")


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["--max-lorass", "3"], {}, "did you mean --max-loras"),
        (["--prot", "3"], {}, "did you mean --port"),
        ([], {"LORADOCK_MAX_LORAZ": "3"}, "did you mean LORADOCK_MAX_LORAS"),
        (["--port", "eighty"], {}, "port takes a whole number"),
        (["--port", "70000"], {}, "0 to 65535"),
        (["--port"], {}, "--port needs a value"),
        (["--port", "--host", "::1"], {}, "--port needs a value"),
        (["one", "two"], {}, "one too many"),
        (["-x"], {}, "one too many"),
        (["--lora-modules", "a=b"], {}, "loradock adapters push"),
        (["--served-model-name", "a"], {}, "is not taken: use name"),
        (["--root-path", "/llm"], {}, "is not taken: put a proxy in front"),
        (["--host", "0.0.0.0"], {}, "LORADOCK_ADMIN_KEYS"),
        (["--host", "example.org"], {}, "LORADOCK_ADMIN_KEYS"),
        (["--name", "a@b"], {}, "--name"),
        (["--admin-keys", "sha256:xyz"], {}, "64"),
        (["--log-level", "loud"], {}, "log_level takes debug, info, warning or error, not 'loud'"),
        (["--grace-period", "-1"], {}, "grace_period takes seconds from 0 up, not -1.0"),
        (["--max-wait", "inf"], {}, "max_wait takes seconds from 0 up, not inf"),
        (["--swap-tolerance", "nan"], {}, "swap_tolerance takes a number from 0 up, not nan"),
        (["--drift-logprobs", "2"], {}, "drift_logprobs takes a share from 0 to 1, not 2.0"),
        (["--drift-reference", "1"], {}, "drift_reference 20 or more"),
        (["--probe=perhaps"], {}, "probe takes true or false, not 'perhaps'"),
        (["--capture-redact", "("], {}, "capture_redact takes regular expressions"),
        (["--allowed-digests", "12"], {}, "allowed_digests takes 64 lower-case hex digits"),
        (["--replicas", "2"], {}, "add --ray"),
        (["--grafana-url", "javascript:alert(1)"], {}, "grafana_url takes URLs as https"),
        (["--lora-kernels", "on"], {}, "lora_kernels takes auto, layers, compile or off"),
        (["--cpu-weights", "int2"], {}, "cpu_weights takes auto, int8 or int4"),
        (["--target-inter-token", "soon"], {}, "target_inter_token takes auto, or seconds from 0 up, not 'soon'"),
        (["--target-inter-token=-1"], {}, "target_inter_token takes auto, or seconds from 0 up, not '-1'"),
        (["--target-inter-token", "inf"], {}, "target_inter_token takes auto, or seconds from 0 up, not 'inf'"),
        (["--front-ends", "0"], {}, "front_ends takes auto, or a whole number from 1 to 99, not '0'"),
        (["--front-ends", "2", "--ray"], {}, "front_ends=2 is for a server without Ray"),
        (["--front-ends", "2", "--ssl-certfile", "a", "--ssl-keyfile", "b"], {}, "cannot send over TLS"),
        (["--cpu-weights", "int8", "--lora-kernels", "off"], {}, "goes with lora_kernels=auto"),
        (["--cpu-weights", "int4", "--lora-kernels", "layers"], {}, "cpu_weights=int4 goes with lora_kernels=auto"),
        (["--speculation", "draft"], {}, "speculation takes off or ngram, not 'draft'"),
        (["--speculation", "ngram", "--lora-kernels", "off"], {}, "speculation=ngram goes with lora_kernels=auto"),
        (["--speculation", "ngram", "--speculative-config", "{}"], {}, "speculative_config do the same: give one"),
        (
            ["--vllm-patches", "none"],
            {},
            "vllm_patches takes all or correctness, .* not 'none'; names: .*media",
        ),
        (["--vllm-patches", "correctness", "--cpu-weights", "int8"], {}, "needs patches that vllm_patches=correctness"),
        (["--vllm-patches", "no-prompt-budget", "--speculation", "ngram"], {}, "speculation=ngram needs patches"),
        (["--max-upload-bytes", "much"], {}, "max_upload_bytes takes"),
        (["--ssl-keyfile", "k"], {}, "go together"),
        (["--config", "/nowhere.yaml"], {}, "cannot be read"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(arguments, environ, says):
    with pytest.raises(ConfigError, match=says):
        load(arguments, environ)


def test_safe_mode_takes_the_kernels_with_it():
    assert load([], {}).lora_kernels == "auto"
    assert load(["--vllm-patches", "correctness"], {}).lora_kernels == "off"
    assert load(["--vllm-patches", "no-fused-step,no-titles"], {}).lora_kernels == "layers"


def test_every_setting_explains_itself():
    listed = {setting.name: setting for setting in settings()}
    ours = {field.name for field in fields(Config)} - {"engine", "engines", "otel"}
    assert set(listed) == ours
    assert all(setting.help and setting.type for setting in settings())
    assert (listed["port"].type, listed["port"].default) == ("0 to 65535", 8000)
    assert listed["lora_kernels"].type == "auto, layers, compile or off"
    assert [listed[name].type for name in ("model", "probe", "data_dir", "api_keys", "max_upload_bytes")] == [
        "text",
        "true or false",
        "a path",
        "a list",
        "a whole number",
    ]


@pytest.mark.parametrize("text", ["- 1", "port: [1", "prot: 3", "engine: 3", "port: {a: 1}", "host: [1]"])
def test_a_file_that_is_none_is_a_sentence(tmp_path, text):
    file = tmp_path / "loradock.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load(["--config", str(file)], {})


@pytest.mark.parametrize(
    "text, says",
    [
        ("port: 1\nhost: a\nport: 2", "the settings have 'port' twice, again in line 3"),
        ("policies: {tone: {worse: rollback}, tone: {}}", "the settings have 'tone' twice"),
        ("engine: {max_loras: 1}\nengine: {max_model_len: 64}", "the settings have 'engine' twice"),
        ("max-loras: 1\nmax_loras: 2", "max_loras is in .* twice"),
        ("max_loras: 1\nengine: {max_loras: 2}", "max_loras is in .* twice, at the top and under `engine:`"),
        ("engines: [{model: ./b, engine: {max-loras: 1, max_loras: 2}}]", "max_loras is in .* twice"),
    ],
)
def test_a_setting_that_is_in_the_file_twice_is_a_sentence(tmp_path, text, says):
    file = tmp_path / "loradock.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(["--config", str(file)], {})


def test_a_key_that_is_twice_in_a_variables_yaml_is_a_sentence():
    with pytest.raises(ConfigError, match="the settings have 'tone' twice"):
        load([], {"LORADOCK_POLICIES": "{tone: {worse: rollback}, tone: {}}"})


@pytest.mark.parametrize("setting", ["API_KEYS", "ADMIN_KEYS", "METRICS_KEYS"])
def test_a_key_that_can_be_guessed_is_not_taken_where_others_can_reach_the_server(setting):
    environ = {"LORADOCK_ADMIN_KEYS": A} | {f"LORADOCK_{setting}": f"{B},secret"}
    with pytest.raises(ConfigError, match=f"{setting.lower()} has 6 characters and 0.0.0.0 .* 16 or more"):
        load(["--host", "0.0.0.0"], environ)
    assert load([], environ).port == 8000, "on this machine alone it goes on"
    hashed = {f"LORADOCK_{setting}": f"sha256:{keys_hashed(['secret'])[0]}"}
    assert load(["--host", "0.0.0.0"], environ | hashed).host == "0.0.0.0"


def test_a_public_address_is_fine_with_keys():
    config = load(["--host", "0.0.0.0"], {"LORADOCK_ADMIN_KEYS": f"{A},{B}", "LORADOCK_API_KEYS": C})
    assert config.admin_keys == keys_hashed([A, B])
    assert A not in config.admin_keys


def test_a_hashed_key_stays_as_it_is():
    digest = keys_hashed(["secret"])[0]
    assert keys_hashed([f"sha256:{digest}"]) == (digest,)


@pytest.mark.parametrize(
    ("text", "size"), [("12", 12), ("2k", 2000), ("512MiB", 512 << 20), ("1GB", 10**9), (" 3 gib ", 3 << 30)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert load(["--max-upload-bytes", text], {}).max_upload_bytes == size


def test_variables_of_client_commands_and_of_the_kernels_build_are_no_settings():
    assert load([], {"LORADOCK_URL": "http://x", "LORADOCK_KEY": "k", "LORADOCK_CPU_MARCH": "haswell"}).port == 8000


def test_further_bases_stand_in_the_file_each_with_its_options(tmp_path):
    file = tmp_path / "loradock.yaml"
    file.write_text("model: ./one\nengine: {max_loras: 2}\nengines:\n- model: ./two\n  engine: {max_loras: 3}\n")
    config = load(["--config", str(file)], {})
    assert [(base.name, dict(base.engine)) for base in config.bases] == [
        ("one", {"max_loras": 2}),
        ("two", {"max_loras": 3}),
    ]


@pytest.mark.parametrize(
    "text, says",
    [
        ("engines: small", "list"),
        ("engines: [{name: small}]", "model"),
        ("engines: [{model: ./a, port: 3}]", "port"),
        ("engines: [{model: ./a, engine: {port: 3}}]", "port"),
        ("engines: [{model: ./a, engine: {max_lorass: 3}}]", "max_loras"),
        ("model: ./a\nengines: [{model: ./b/a}]", "two engines"),
        ("engines: [{model: ./a, name: x@y}]", "@"),
    ],
)
def test_a_further_base_that_is_none_is_a_sentence(tmp_path, text, says):
    file = tmp_path / "loradock.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(["--config", str(file)], {})
