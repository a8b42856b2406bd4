/** The server's API: the model's name, and a chat completion as a stream of chunks. Every failure is a ChatError. */

/** What went wrong, in words for the reader. kind: "unreachable", "unauthorised", "busy", "server" or "stream". */
export class ChatError extends Error {
  constructor(kind, title, detail) {
    super(title);
    this.kind = kind;
    this.title = title;
    this.detail = detail;
  }
}

/** The models that the server offers. */
export async function listModels(apiKey) {
  const response = await request("v1/models", { headers: headers(apiKey) });
  const body = await response.json();
  return body.data;
}

/** Yield the chunks of one chat completion. Aborting `signal` raises its AbortError. */
export async function* streamChat(body, apiKey, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: headers(apiKey),
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parseChunk(data);
    if (chunk.error) throw new ChatError("stream", "The server broke off the reply", chunk.error.message);
    yield chunk;
  }
  throw new ChatError("stream", "The connection was lost", "The reply ended before it was complete.");
}

function headers(apiKey) {
  const fields = { "Content-Type": "application/json" };
  if (apiKey) fields.Authorization = `Bearer ${apiKey}`;
  return fields;
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ChatError("unreachable", "The server cannot be reached", "Check that it is running, then retry.");
  }
  if (!response.ok) throw await statusError(response);
  return response;
}

async function statusError(response) {
  const detail = errorMessage(await response.text()) || `${response.status} ${response.statusText}`.trim();
  if (response.status === 401) return new ChatError("unauthorised", "The server asks for an API key", detail);
  if (response.status === 429) {
    const seconds = response.headers.get("Retry-After");
    const wait = seconds ? ` Try again in ${seconds} s.` : "";
    return new ChatError("busy", "The server is busy", detail + wait);
  }
  return new ChatError("server", `The server refused the request (${response.status})`, detail);
}

/** The message in an error body of OpenAI's shape; the body itself where it has another. */
function errorMessage(text) {
  try {
    return JSON.parse(text).error?.message ?? text;
  } catch {
    return text;
  }
}

function parseChunk(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ChatError("stream", "The server sent something unreadable", data.slice(0, 200));
  }
}

/** The `data` of each server-sent event. */
async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await readOrFail(reader);
    if (done) return;
    buffer += value;
    const events = buffer.split(/\r?\n\r?\n/);
    buffer = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

async function readOrFail(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ChatError("stream", "The connection was lost", "The server went away in the middle of the reply.");
  }
}
