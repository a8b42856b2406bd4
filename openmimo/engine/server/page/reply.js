/**
 * A turn of the assistant, built from the chunks of a stream. A reply is plain data, so that it survives a reload.
 *
 * An engine step adds the drafts that were accepted and then one token of its own. So the position of a drafted token
 * is its place in the run since the last own token, and the acceptance length is tokens over steps.
 */

const MAX_POSITION = 3; // shades of tint: a fourth accepted draft looks like the third

export function newReply() {
  return {
    role: "assistant",
    state: "waiting", // then "thinking", "writing", and one of "done", "stopped", "failed"
    reasoning: "",
    reasoningMarks: "",
    content: "",
    contentMarks: "",
    toolCalls: [], // {id, name, arguments (JSON text)}
    tokens: 0,
    steps: 0, // 0: the server does not tell which tokens were drafted
    seconds: 0, // from the first chunk with tokens to the last
    thinkingSeconds: 0,
    tokensPerSecond: 0,
    audio: null, // {id, pieces: [base64 of pcm16]} of a spoken reply; content is its transcript
    finishReason: "",
    error: null, // {title, detail, kind}
  };
}

export function isRunning(reply) {
  return reply.state === "waiting" || reply.state === "thinking" || reply.state === "writing";
}

/** Tokens per engine step, or 0 where the server does not tell. */
export function acceptanceLength(reply) {
  return reply.steps ? reply.tokens / reply.steps : 0;
}

/** Whether the arguments came to their end: a call that was cut off can be neither answered nor given back. */
export function isWhole(call) {
  try {
    JSON.parse(call.arguments);
    return true;
  } catch {
    return false;
  }
}

/** The conversation in the form of `/v1/chat/completions`; a reply that failed before it said anything is left out. */
export function requestMessages(turns, systemPrompt) {
  const messages = systemPrompt.trim() ? [{ role: "system", content: systemPrompt }] : [];
  for (const turn of turns) {
    if (turn.role === "assistant") {
      const message = assistantMessage(turn);
      if (message) messages.push(message);
    } else if (turn.role === "tool") {
      messages.push({ role: "tool", tool_call_id: turn.toolCallId, content: turn.content });
    } else {
      messages.push({ role: "user", content: userContent(turn) });
    }
  }
  return messages;
}

function userContent(turn) {
  if (!turn.audio) return turn.content;
  if (!turn.audio.data) return turn.content || "(a recording that the page has not kept)";
  const recording = { type: "input_audio", input_audio: { data: turn.audio.data, format: "wav" } };
  return turn.content ? [{ type: "text", text: turn.content }, recording] : [recording];
}

function assistantMessage(turn) {
  const calls = turn.toolCalls.filter(isWhole);
  if (!turn.content && !turn.reasoning && !turn.audio && !calls.length) return null;
  const message = { role: "assistant", content: turn.content || null };
  if (turn.audio) message.audio = { id: turn.audio.id };
  if (turn.reasoning) message.reasoning_content = turn.reasoning;
  if (calls.length) {
    message.tool_calls = calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  return message;
}

/** Adds chunks to a reply. `hear` is called with each piece of its sound; `now` returns milliseconds. */
export class ReplyBuilder {
  constructor(reply, hear = () => {}, now = () => performance.now()) {
    this.reply = reply;
    this.hear = hear;
    this.now = now;
    this.draftRun = 0;
    this.pendingText = ""; // announced by token_details, not yet seen in the reply's text
    this.pendingMarks = "";
    this.firstAt = null;
    this.tokensAtFirst = 0;
  }

  add(chunk) {
    const choice = chunk.choices?.[0];
    if (choice) this.addChoice(choice);
    if (chunk.usage) this.reply.tokens = chunk.usage.completion_tokens;
    this.updateSpeed();
  }

  addChoice(choice) {
    const delta = choice.delta ?? {};
    const before = this.reply.tokens;
    if (choice.token_details) this.addDetails(choice.token_details);
    else if (delta.content || delta.reasoning_content || delta.tool_calls || delta.audio) this.reply.tokens += 1;
    if (this.reply.tokens > before) this.stampTime();
    if (delta.reasoning_content) this.addText("reasoning", delta.reasoning_content);
    if (delta.content) this.addText("content", delta.content);
    if (delta.audio) this.addAudio(delta.audio);
    for (const call of delta.tool_calls ?? []) this.addToolCall(call);
    if (choice.finish_reason) this.reply.finishReason = choice.finish_reason;
  }

  addDetails(details) {
    for (const { text, drafted } of details) {
      if (this.draftRun === 0) this.reply.steps += 1; // the token before was a step's own, the last of its step
      this.draftRun = drafted ? this.draftRun + 1 : 0;
      this.reply.tokens += 1;
      this.pendingText += text;
      this.pendingMarks += String(Math.min(this.draftRun, MAX_POSITION)).repeat(text.length);
    }
  }

  addText(field, text) {
    this.reply.state = field === "reasoning" ? "thinking" : "writing";
    this.reply[field] += text;
    this.reply[`${field}Marks`] += this.takeMarks(text);
  }

  /** The marks of `text`. Markup that the server took out of the stream (thinking and tool tags) is skipped. */
  takeMarks(text) {
    const start = this.pendingText.indexOf(text);
    if (start < 0) return "0".repeat(text.length);
    const marks = this.pendingMarks.slice(start, start + text.length);
    this.pendingText = this.pendingText.slice(start + text.length);
    this.pendingMarks = this.pendingMarks.slice(start + text.length);
    return marks;
  }

  addAudio({ id, transcript, data }) {
    this.reply.audio ??= { id, pieces: [] };
    if (transcript) this.addText("content", transcript);
    if (!data) return;
    this.reply.state = "writing";
    this.reply.audio.pieces.push(data);
    this.hear(data);
  }

  addToolCall(part) {
    this.reply.state = "writing";
    const calls = this.reply.toolCalls;
    while (calls.length <= part.index) calls.push({ id: "", name: "", arguments: "" });
    const call = calls[part.index];
    if (part.id) call.id = part.id;
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }

  stampTime() {
    const now = this.now();
    if (this.firstAt === null) {
      this.firstAt = now;
      this.tokensAtFirst = this.reply.tokens;
    }
    this.reply.seconds = (now - this.firstAt) / 1000;
    if (this.reply.state !== "writing") this.reply.thinkingSeconds = this.reply.seconds;
  }

  updateSpeed() {
    const { reply } = this;
    if (reply.seconds > 0) reply.tokensPerSecond = (reply.tokens - this.tokensAtFirst) / reply.seconds;
  }
}
