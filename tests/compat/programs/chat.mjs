// openai-node: chat, stream, the .stream() helper with the whole conversation, completions, responses, models.
import OpenAI from "openai";
import { strict as assert } from "node:assert";

const { BASE_URL, API_KEY, MODEL, SESSION, TURNS } = process.env;
const turns = JSON.parse(TURNS);
const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0 });
const headers = { headers: { "X-Session-ID": SESSION } };
const greedy = { model: MODEL, temperature: 0, max_tokens: 12 };
const replies = [];
const messages = [];

messages.push({ role: "user", content: turns[0] });
const { data, response } = await client.chat.completions.create({ ...greedy, messages }, headers).withResponse();
assert.equal(response.headers.get("x-session-version"), "1");
replies.push(data.choices[0].message.content);
messages.push(data.choices[0].message, { role: "user", content: turns[1] });

let text = "";
const stream = await client.chat.completions.create({ ...greedy, messages, stream: true }, headers);
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
replies.push(text);
messages.push({ role: "assistant", content: text }, { role: "user", content: turns[2] });

const helper = client.chat.completions.stream({ ...greedy, messages, stream_options: { include_usage: true } }, headers);
replies.push((await helper.finalChatCompletion()).choices[0].message.content);
assert.ok((await helper.totalUsage()).completion_tokens > 0);

const completion = await client.completions.create({ ...greedy, prompt: "Once", logprobs: 1, echo: true });
assert.ok(completion.choices[0].text.startsWith("Once"));
const one = await client.responses.create({ model: MODEL, temperature: 0, max_output_tokens: 12, input: turns[0] });
const two = await client.responses.create({
  model: MODEL, temperature: 0, max_output_tokens: 12, input: turns[1], previous_response_id: one.id,
});
assert.equal(one.output_text, replies[0]);
assert.equal(two.output_text, replies[1]);
const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert.ok(names.includes(MODEL));
await assert.rejects(client.chat.completions.create({ ...greedy, model: "no-such", messages }), OpenAI.NotFoundError);
console.log(JSON.stringify(replies));
