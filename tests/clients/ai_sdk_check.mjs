// The AI SDK: texts, streams, tools in steps and objects, with the providers for each of the server's APIs.
// `node ai_sdk_check.mjs URL SCRIPTED_URL FOLDER`, in a folder with the packages, prints the lines of checks.py.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenResponses } from "@ai-sdk/open-responses";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const MODEL = "tiny";
const PACKAGES = ["ai", "@ai-sdk/openai", "@ai-sdk/anthropic", "@ai-sdk/open-responses"];
const [url, scriptedUrl] = process.argv.slice(2);

const FORM = z.object({ city: z.string(), degrees: z.number() });
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `4 degrees in ${city}`,
});

function modelsOf(address) {
  const openai = createOpenAI({ baseURL: `${address}/v1`, apiKey: "none" });
  const anthropic = createAnthropic({ baseURL: `${address}/v1`, apiKey: "none" });
  const open = createOpenResponses({ name: "openmimo", url: `${address}/v1/responses`, apiKey: "none" });
  return {
    "openai responses": openai(MODEL),
    "openai chat": openai.chat(MODEL),
    anthropic: anthropic(MODEL),
    "open-responses": open(MODEL),
  };
}

const checks = [];

for (const [name, model] of Object.entries(modelsOf(url))) {
  checks.push([
    `AI SDK ${name}, streamed and whole`,
    async () => {
      const ask = { model, prompt: "hello", temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
      const whole = await generateText(ask);
      let streamed = "";
      for await (const part of streamText(ask).textStream) streamed += part;
      assert.equal(streamed, whole.text);
      assert.equal(whole.usage.outputTokens, 12);
    },
  ]);
}

for (const [name, model] of Object.entries(modelsOf(scriptedUrl))) {
  checks.push([
    `AI SDK ${name}, tools in steps`,
    async () => {
      const ask = { model, prompt: "weather in Oslo?", tools: { weather }, stopWhen: stepCountIs(3), maxRetries: 0 };
      const { text, steps } = await generateText(ask);
      assert.equal(steps[0].toolResults[0].output, "4 degrees in Oslo");
      assert.equal(text, "It is 4 degrees in Oslo.");
      const streamed = streamText(ask);
      let last = "";
      for await (const part of streamed.textStream) last += part;
      assert.ok(last.endsWith(text));
    },
  ]);
}

for (const name of ["openai responses", "openai chat"]) {
  checks.push([
    `AI SDK ${name}, object`,
    async () => {
      const model = modelsOf(scriptedUrl)[name];
      const ask = { model, prompt: "weather in Oslo?", output: Output.object({ schema: FORM }), maxRetries: 0 };
      assert.deepEqual((await generateText(ask)).output, { city: "Oslo", degrees: 4 });
    },
  ]);
}

const versionOf = (name) => JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8")).version;
console.log(JSON.stringify({ versions: Object.fromEntries(PACKAGES.map((name) => [name, versionOf(name)])) }));
for (const [check, run] of checks) {
  const start = performance.now();
  let problem = "";
  try {
    await run();
  } catch (error) {
    console.error(error);
    problem = `${error.name}: ${error.message}`;
  }
  console.log(JSON.stringify({ check, problem, seconds: (performance.now() - start) / 1000 }));
}
