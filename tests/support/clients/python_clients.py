"""What each library asks of a server: `python python_clients.py NAME` prints the answers by kind, as JSON.

It runs in an environment that has this library and nothing of loradock; the server is named by URL, KEY, MODEL and
ADAPTER. A chat and a stream name Paris, the adapter answers with its word, and what is structured is a city.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, KEY, MODEL, ADAPTER = (os.environ[name] for name in ("URL", "KEY", "MODEL", "ADAPTER"))
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SHORT = {"temperature": 0, "max_tokens": 32}


def city():
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    return City


def openai_client(kind="OpenAI"):
    import openai

    return getattr(openai, kind)(base_url=URL, api_key=KEY)


def langchain_openai():
    from langchain_openai import ChatOpenAI

    chat, adapter = (ChatOpenAI(base_url=URL, api_key=KEY, model=model, **SHORT) for model in (MODEL, ADAPTER))
    return {
        "chat": chat.invoke(QUESTION).content,
        "stream": [chunk.content for chunk in chat.stream(QUESTION)],
        "adapter": adapter.invoke(QUESTION).content,
        "structured": chat.with_structured_output(city(), method="json_schema").invoke(QUESTION).name,
    }


def litellm():
    from litellm import completion

    shared = {"api_base": URL, "api_key": KEY, "messages": MESSAGES, **SHORT}
    chunks = completion(model=f"openai/{MODEL}", stream=True, **shared)
    structured = completion(model=f"openai/{MODEL}", response_format=city(), **shared)
    return {
        "chat": completion(model=f"openai/{MODEL}", **shared).choices[0].message.content,
        "stream": [chunk.choices[0].delta.content or "" for chunk in chunks],
        "adapter": completion(model=f"openai/{ADAPTER}", **shared).choices[0].message.content,
        "structured": json.loads(structured.choices[0].message.content)["name"],
    }


def llm():
    with tempfile.TemporaryDirectory() as folder:
        entries = [f"- model_id: {model}\n  model_name: {model}\n  api_base: {URL}\n" for model in (MODEL, ADAPTER)]
        Path(folder, "extra-openai-models.yaml").write_text("".join(entries))

        def ask(model, *more):
            command = [sys.executable, "-m", "llm", "-m", model, "--key", KEY, "-o", "temperature", "0"]
            command += ["-o", "max_tokens", "32", *more, QUESTION]
            environ = {**os.environ, "LLM_USER_PATH": folder}
            return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout

        return {"chat": ask(MODEL, "--no-stream"), "stream": list(ask(MODEL)), "adapter": ask(ADAPTER)}


def instructor():
    import instructor

    client = instructor.from_openai(openai_client(), mode=instructor.Mode.JSON_SCHEMA)
    create = client.chat.completions.create
    return {"structured": create(model=MODEL, response_model=city(), messages=MESSAGES, **SHORT).name}


def pydantic_ai():
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def agent(name, **more):
        model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=URL, api_key=KEY))
        return Agent(model, model_settings=SHORT, **more)

    return {
        "chat": agent(MODEL).run_sync(QUESTION).output,
        "adapter": agent(ADAPTER).run_sync(QUESTION).output,
        "structured": agent(MODEL, output_type=NativeOutput(city())).run_sync(QUESTION).output.name,
    }


def openai_agents():
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        set_tracing_disabled,
    )

    set_tracing_disabled(True)

    def ask(name, kind):
        model = kind(model=name, openai_client=openai_client("AsyncOpenAI"))
        agent = Agent(name="A", model=model, model_settings=ModelSettings(**SHORT))
        return Runner.run_sync(agent, QUESTION).final_output

    return {
        "chat": ask(MODEL, OpenAIChatCompletionsModel),
        "responses": ask(MODEL, OpenAIResponsesModel),
        "adapter": ask(ADAPTER, OpenAIChatCompletionsModel),
    }


def llama_index():
    from llama_index.llms.openai_like import OpenAILike

    def model(name):
        return OpenAILike(model=name, api_base=URL, api_key=KEY, is_chat_model=True, context_window=2048, **SHORT)

    return {
        "chat": model(MODEL).complete(QUESTION).text,
        "stream": [part.delta for part in model(MODEL).stream_complete(QUESTION)],
        "adapter": model(ADAPTER).complete(QUESTION).text,
    }


def dspy():
    import dspy

    def ask(name):
        return dspy.LM(f"openai/{name}", api_base=URL, api_key=KEY, cache=False, **SHORT)(QUESTION)[0]

    chat, adapter = ask(MODEL), ask(ADAPTER)
    return {"chat": chat if isinstance(chat, str) else chat["text"], "adapter": str(adapter)}


def outlines():
    import outlines

    model = outlines.from_openai(openai_client(), MODEL)
    adapter = outlines.from_openai(openai_client(), ADAPTER)
    return {
        "chat": model(QUESTION, **SHORT),
        "adapter": adapter(QUESTION, **SHORT),
        "structured": json.loads(model(QUESTION, city(), **SHORT))["name"],
    }


def haystack():
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    chunks = []

    def ask(name, **more):
        generator = OpenAIChatGenerator(
            api_key=Secret.from_token(KEY), api_base_url=URL, model=name, generation_kwargs=SHORT, **more
        )
        return generator.run([ChatMessage.from_user(QUESTION)])["replies"][0].text

    ask(MODEL, streaming_callback=lambda chunk: chunks.append(chunk.content))
    return {"chat": ask(MODEL), "stream": chunks, "adapter": ask(ADAPTER)}


def smolagents():
    from smolagents import OpenAIServerModel

    def ask(name):
        model = OpenAIServerModel(model_id=name, api_base=URL, api_key=KEY, **SHORT)
        content = [{"type": "text", "text": QUESTION}]
        return model.generate([{"role": "user", "content": content}]).content

    return {"chat": ask(MODEL), "adapter": ask(ADAPTER)}


def semantic_kernel():
    from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
    from semantic_kernel.contents import ChatHistory

    async def ask(name):
        service = OpenAIChatCompletion(ai_model_id=name, async_client=openai_client("AsyncOpenAI"))
        history = ChatHistory()
        history.add_user_message(QUESTION)
        settings = OpenAIChatPromptExecutionSettings(**SHORT)
        whole = str(await service.get_chat_message_content(history, settings))
        return whole, [str(part) async for part in service.get_streaming_chat_message_content(history, settings)]

    (chat, stream), (adapter, _) = asyncio.run(ask(MODEL)), asyncio.run(ask(ADAPTER))
    return {"chat": chat, "stream": stream, "adapter": adapter}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
