// What each library asks of a server: `node javascript_clients.mjs NAME` prints the answers by kind, as JSON.
// It runs beside a node_modules that has this library; the server is named by URL, KEY, MODEL and ADAPTER.

const { URL: url, KEY: key, MODEL: base, ADAPTER: adapter } = process.env;
const question = "What is the capital of France?", messages = [{ role: "user", content: question }];

const clients = {
  async openai() {
    const { default: OpenAI } = await import("openai");
    const client = new OpenAI({ baseURL: url, apiKey: key });
    const ask = (model, more = {}) => client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 32, ...more });
    const stream = [];
    for await (const chunk of await ask(base, { stream: true })) stream.push(chunk.choices[0]?.delta?.content ?? "");
    const schema = { type: "object", properties: { name: { type: "string" } }, required: ["name"], additionalProperties: false };
    const shaped = await ask(base, { response_format: { type: "json_schema", json_schema: { name: "city", schema, strict: true } } });
    const response = await client.responses.create({ model: base, input: question, temperature: 0, max_output_tokens: 32 });
    return {
      chat: (await ask(base)).choices[0].message.content, stream, adapter: (await ask(adapter)).choices[0].message.content,
      structured: JSON.parse(shaped.choices[0].message.content).name, responses: response.output_text,
    };
  },
  async anthropic() {
    const { default: Anthropic } = await import("@anthropic-ai/sdk");
    const client = new Anthropic({ baseURL: url.replace(/\/v1$/, ""), apiKey: key });
    const ask = (model) => ({ model, messages, temperature: 0, max_tokens: 32 });
    const stream = [];
    for await (const event of client.messages.stream(ask(base))) if (event.type === "content_block_delta") stream.push(event.delta.text ?? "");
    const text = async (model) => (await client.messages.create(ask(model))).content.map((part) => part.text).join("");
    return { chat: await text(base), stream, adapter: await text(adapter) };
  },
  async ai() {
    const { generateText, streamText } = await import("ai"), { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
    const provider = createOpenAICompatible({ name: "loradock", baseURL: url, apiKey: key });
    const ask = (model) => ({ model: provider(model), prompt: question, temperature: 0, maxOutputTokens: 32 });
    const stream = [];
    for await (const part of streamText(ask(base)).textStream) stream.push(part);
    return { chat: (await generateText(ask(base))).text, stream, adapter: (await generateText(ask(adapter))).text };
  },
  async langchain() {
    const { ChatOpenAI } = await import("@langchain/openai");
    const chat = (model) => new ChatOpenAI({ model, temperature: 0, maxTokens: 32, apiKey: key, configuration: { baseURL: url } });
    const stream = [];
    for await (const part of await chat(base).stream(question)) stream.push(part.content);
    return { chat: (await chat(base).invoke(question)).content, stream, adapter: (await chat(adapter).invoke(question)).content };
  },
};

console.log(JSON.stringify(await clients[process.argv[2]]()));
