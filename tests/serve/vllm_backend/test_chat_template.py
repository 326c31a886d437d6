"""A chat template that does not end is found before the event loop waits for it; what one raises is a sentence."""

import threading
from types import SimpleNamespace

import pytest
from jinja2 import sandbox
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams

from serve.errors import ConfigError
from serve.vllm_backend.chat_template import check_ends, guard
from tests.support.waiting import settled


class Rendering:
    """A renderer whose template waits, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_end = threading.Event()
        self.error = error

    def render_chat(self, conversations: object, chat_params: object) -> None:
        self.may_end.wait()
        if self.error:
            raise self.error


async def test_a_template_that_does_not_end_is_refused_with_what_would_do():
    renderer = Rendering()
    try:
        with pytest.raises(ConfigError, match="template of odd is not through .* give another one"):
            await check_ends(renderer, None, "odd", 0.01)
    finally:
        renderer.may_end.set()


@pytest.mark.parametrize("error", [None, ValueError("roles must alternate")])
async def test_one_that_ends_or_refuses_the_message_is_taken(error):
    renderer = Rendering(error)
    renderer.may_end.set()
    await check_ends(renderer, None, "fine")


@pytest.fixture
def renderer(monkeypatch):
    """vLLM's own, of a tokenizer without a template, with what a server does to it."""
    for module in (sandbox, chat_template_utils):
        monkeypatch.setattr(module, "ImmutableSandboxedEnvironment", module.ImmutableSandboxedEnvironment)
    chat_template_utils._compile_jinja_template.cache_clear()
    named = dict.fromkeys(("revision", "code_revision", "tokenizer_revision", "multimodal_config"))
    model = SimpleNamespace(
        **named,
        tokenizer="odd",
        model="odd",
        trust_remote_code=False,
        enable_prompt_embeds=False,
        supports_multimodal_inputs=False,
        is_multimodal_model=False,
        renderer_num_workers=1,
        hf_config=SimpleNamespace(model_type="llama"),
    )
    config = SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(_api_process_rank=0))
    renderer = HfRenderer(config, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))
    guard(renderer)
    yield renderer
    renderer._executor.shutdown(wait=False)


async def rendered(renderer, template):
    params = ChatParams(template, chat_template_kwargs={"tokenize": False})
    _, prompt = await renderer.render_messages_async([{"role": "user", "content": "ab"}], params)
    return prompt["prompt"]


# A text that doubles until it is larger than any memory.
TWICE = "{% set ns = namespace(x='a') %}{% for i in range(50) %}{% set ns.x = MORE %}{% endfor %}"


@pytest.mark.parametrize(
    "template, says",
    [
        (None, "^this model has no chat template. Ask it prompts"),
        ("{{ messages", r"^the chat template cannot be read, line 1: .*\. Ask it prompts .* --chat-template FILE$"),
        ("\n\n{{ messages | nothing }}", "^the chat template cannot be read, line 3: No filter named 'nothing'"),
        ("{{ raise_exception('roles must alternate') }}", "^roles must alternate$"),
        ("{{ range(1000000000) | list }}", "Range too big"),
        ("{{ 'a' * 1000000000 }}", "makes more than 16,777,216 characters"),
        ("{{ 1000000000 * messages[0].content }}", "makes more than 16,777,216 characters"),
        ("{{ [0] * 1000000000 }}", "makes more than 16,777,216 characters or items"),
        ("{{ 7 ** 999999999 }}", "makes more than 16,777,216"),
        (TWICE.replace("MORE", "ns.x ~ ns.x"), "by putting texts together$"),
        (TWICE.replace("MORE", "ns.x + ns.x"), r"by `\+`$"),
        (TWICE.replace("MORE", "[ns.x, ns.x] | join"), "by putting texts together$|by `join`$"),
        (TWICE.replace("MORE", "ns.x.replace('a', 'aa')"), "by `replace`$"),
        ("{% set x = 'a' * 9999999 %}{{ x }}{{ x }}", "by putting texts together$"),
        ("{% set x = 'a' * 9999999 %}{% set y %}{{ x }}{{ x }}{% endset %}", "by putting texts together$"),
        ("{% set x = 'a' * 9999999 %}{{ (['a'] * 99) | map('lower') | map('replace', 'a', x) | join }}", "by `join`$"),
        ("{{ messages[0].content | center(1000000000) }}", "by `center`$"),
        ("{{ 'a' | center(1000000000) }}", "by `center`$"),
        ("{{ messages[0].content.center(1000000000) }}", "by `center`$"),
        ("{{ ['a'] | map('center', 1000000000) | list }}", "by `map`$"),
        ("{{ '%1000000000d' % 1 }}", "by `%`$"),
        ("{{ '%*d' % (1000000000, 1) }}", "by `%`$"),
        ("{{ '%1000000000d' | format(1) }}", "by `format`$"),
        ("{{ '{:>1000000000}'.format(1) }}", "by `format`$"),
        ("{{ '{:>{}}'.format(1, 1000000000) }}", "by `format`$"),
        ("{{ 'a\n\na' | indent(1000000000) }}", "by `indent`$"),
        ("{{ messages | tojson(indent=1000000000) }}", "by `tojson`$"),
        ("{{ 'a'.ljust(1000000000) }}", "by `ljust`$"),
        ("{{ [1] | batch(1000000000, 0) | list }}", "by `batch`$"),
    ],
)
async def test_what_a_template_raises_is_a_sentence_to_the_client(renderer, template, says):
    with pytest.raises(VLLMValidationError, match=says):
        await rendered(renderer, template)


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ '=' * 3 }}{{ messages[0].content }}{{ 2 ** 3 }}{{ 2 * 1.5 }}{{ 1 + 2 }}{{ 5 % 3 }}", "===ab83.032"),
        ("{{ 1 ~ nothing ~ messages[0].content ~ none }}", "1abNone"),
        ("{{ '%5d|%s|%-3s' % (1, 'x' + 'y', messages[0].content) }}", "    1|xy|ab "),
        ("{{ '{:>4}{}'.format('a', 1.5) }}{{ '%.2f' | format(0.125) }}", "   a1.50.12"),
        ("{{ messages | map(attribute='content') | join(',') | center(6) }}", "  ab  "),
        ("{{ ([1] + [2]) | tojson(indent=2) }}{{ messages[0].content.split('a') }}", "[\n  1,\n  2\n]['', 'b']"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{% set y %}{{ m('a') }}{% endset %}{{ y ~ y }}", "<a><a>"),
        ("{{ 'x' | replace('x', 'y') | upper | trim }}{{ messages[0].items() | list | length }}", "Y2"),
    ],
)
async def test_operators_filters_and_calls_do_what_jinjas_do(renderer, template, text):
    assert await rendered(renderer, template) == text


async def test_a_template_that_does_not_end_for_a_chat_is_ended(renderer, monkeypatch):
    monkeypatch.setenv("VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT", "0.1")
    loops = "{% for i in range(99999) %}" * 3
    renders = renderer._executor._inner._threads
    with pytest.raises(VLLMServerError, match="is not through with this chat after 0.1 s"):
        await rendered(renderer, loops + "{% endfor %}" * 3)
    await settled(lambda: not any(thread.is_alive() for thread in renders))
    assert await rendered(renderer, "{{ messages[0].content }}") == "ab"
