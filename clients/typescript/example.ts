// node example.js SESSION [BASE_URL]: teach, look at the memory, keep it, go back to it.
import { openai, sessionOf, sessions, type Memory, type Snapshot } from "./nested.js";

const [session = "alice", base = "http://127.0.0.1:8000"] = process.argv.slice(2);
const ai = openai(session, `${base}/v1`);
const model = (await ai.models.list()).data[0]?.id ?? "hope-nano";

const memory: Memory = { memory: { learn: "all" } };
const told = await ai.chat.completions.create({
  model,
  messages: [{ role: "user", content: "My dog is called Rex." }],
  max_tokens: 16,
  ...memory,
});
console.log("version", sessionOf(told)?.version);

const api = sessions(base);
const params = { path: { id: session } };
const kept = await api.POST("/v1/sessions/{id}/snapshot", { params, body: { label: "one fact" } });
if (kept.error) throw new Error(kept.error.error.message);
const snapshot: Snapshot = kept.data;

const stream = await ai.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is my dog called?" }],
  max_tokens: 16,
  stream: true,
});
let version: number | undefined;
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  version = sessionOf(chunk)?.version ?? version;
}
console.log("\nversion", version);

const back = await api.POST("/v1/sessions/{id}/restore", { params, body: { snapshot: snapshot.snapshot } });
const { data: info } = await api.GET("/v1/sessions/{id}", { params });
console.log("version", back.data?.version, "digest kept", info?.digest === back.data?.digest);
