/** The turns of the conversation as DOM nodes. Actions are callbacks; nothing here changes the conversation. */

import { MarkdownView } from "./markdown.js";
import { acceptanceLength, isRunning } from "./reply.js";

const FINISH_NOTES = {
  length: "Cut off at the token limit.",
  repetition: "Ended because the text repeated itself.",
  content_filter: "Ended by a filter.",
};

export function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

export function button(label, icon, onClick) {
  const node = element("button", "quiet");
  node.type = "button";
  node.append(iconNode(icon), element("span", "", label));
  node.addEventListener("click", onClick);
  return node;
}

function iconNode(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

function turnNode(kind, label) {
  const node = element("article", `turn ${kind}`);
  node.setAttribute("aria-label", label);
  return node;
}

/** The reader's turn. actions: {copy(button), edit(node), play()}. */
export function userTurn(turn, actions) {
  const node = turnNode("user", "You");
  const bubble = element("div", "bubble");
  if (turn.audio) bubble.append(element("span", "voice", `Recording, ${turn.audio.seconds.toFixed(1)} s`));
  bubble.append(turn.content);
  node.append(bubble);
  const bar = element("div", "actions");
  if (turn.audio?.data) bar.append(button("Play", "play", () => actions.play()));
  bar.append(
    button("Copy", "copy", (event) => actions.copy(event.currentTarget)),
    button("Edit", "edit", () => actions.edit(node)),
  );
  node.append(bar);
  return node;
}

/** Put an editor in place of a user turn. submit(text) and cancel() are called once. */
export function openEditor(node, text, submit, cancel) {
  const form = element("form", "editor");
  const area = element("textarea");
  area.value = text;
  area.rows = Math.min(12, text.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit your message");
  const bar = element("div", "actions");
  const send = element("button", "primary", "Send again");
  bar.append(button("Cancel", "close", cancel), send);
  form.append(area, element("p", "hint", "Sending again drops the turns that follow."), bar);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value.trim()) submit(area.value);
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (isSendKey(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  node.replaceChildren(form);
  area.focus();
  area.setSelectionRange(text.length, text.length);
}

/** Enter sends; with Shift it starts a line, and while an input method composes it chooses a character. */
export function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

/** What a tool returned. */
export function toolTurn(turn) {
  const node = turnNode("tool-result", `Result of ${turn.name}`);
  const details = element("details");
  details.append(element("summary", "", `Result of ${turn.name}`), codeText(prettyJson(turn.content)));
  node.append(details);
  return node;
}

/** The assistant's turn. actions: {copy(button), retry(), enterKey(), sendResults(results), play()}. */
export class AssistantView {
  constructor(actions) {
    this.actions = actions;
    this.node = turnNode("assistant", "Assistant");
    this.waiting = element("p", "waiting", "Waiting for the first token");
    this.thinking = this.buildThinking();
    this.content = element("div", "markdown");
    this.markdown = new MarkdownView(this.content);
    this.tools = element("div", "tools");
    this.toolViews = [];
    this.notice = element("div", "notices");
    this.stats = element("p", "stats");
    this.bar = element("div", "actions");
    this.play = button("Play", "play", () => actions.play());
    this.bar.append(
      this.play,
      button("Copy", "copy", (event) => actions.copy(event.currentTarget)),
      button("Retry", "retry", () => actions.retry()),
    );
    const footer = element("div", "footer");
    footer.append(this.stats, this.bar);
    this.node.append(this.waiting, this.thinking, this.content, this.tools, this.notice, footer);
  }

  buildThinking() {
    const details = element("details", "thinking");
    this.thinkingLabel = element("summary");
    const body = element("div", "markdown");
    this.thinkingMarkdown = new MarkdownView(body);
    details.append(this.thinkingLabel, body);
    return details;
  }

  /** Show `reply` as it stands. awaitsResults: its tool calls have no results yet. */
  update(reply, awaitsResults) {
    const running = isRunning(reply);
    this.node.setAttribute("aria-busy", String(running));
    this.node.classList.toggle("running", running);
    this.waiting.hidden = reply.state !== "waiting";
    this.thinking.hidden = !reply.reasoning;
    this.thinkingLabel.textContent = thinkingLabel(reply);
    this.thinkingMarkdown.update(reply.reasoning, reply.reasoningMarks);
    this.markdown.update(reply.content, reply.contentMarks);
    this.updateTools(reply);
    this.stats.textContent = statsText(reply);
    this.play.hidden = !reply.audio?.pieces?.length;
    this.bar.hidden = running || Boolean(reply.error);
    if (!running) this.showEnd(reply, awaitsResults);
  }

  updateTools(reply) {
    reply.toolCalls.forEach((call, index) => {
      this.toolViews[index] ??= new ToolCallView(this.tools);
      this.toolViews[index].update(call, isRunning(reply));
    });
  }

  showEnd(reply, awaitsResults) {
    this.notice.replaceChildren();
    const note = reply.state === "stopped" ? "Stopped." : FINISH_NOTES[reply.finishReason];
    if (note) this.notice.append(element("p", "note", note));
    if (reply.error) this.notice.append(this.errorNotice(reply.error));
    if (awaitsResults) this.notice.append(this.resultsForm(reply.toolCalls));
  }

  errorNotice(error) {
    const node = element("div", "error");
    node.append(element("strong", "", error.title), element("p", "", error.detail));
    const bar = element("div", "actions");
    bar.append(button("Retry", "retry", () => this.actions.retry()));
    if (error.kind === "unauthorised") bar.append(button("Enter a key", "settings", () => this.actions.enterKey()));
    node.append(bar);
    return node;
  }

  resultsForm(calls) {
    const form = element("form", "results");
    const areas = calls.map((call) => {
      const label = element("label", "", `Result of ${call.name}`);
      const area = element("textarea");
      area.rows = 2;
      area.required = true;
      area.placeholder = "What the tool returned";
      label.append(area);
      form.append(label);
      return area;
    });
    form.append(element("button", "primary", calls.length > 1 ? "Send results" : "Send result"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.sendResults(areas.map((area) => area.value));
    });
    return form;
  }
}

class ToolCallView {
  constructor(container) {
    this.details = element("details", "tool-call");
    this.details.open = true;
    this.summary = element("summary");
    this.name = element("code");
    this.state = element("span", "state");
    this.summary.append(iconNode("tool"), element("span", "", "Calls"), this.name, this.state);
    this.pre = codeText("");
    this.details.append(this.summary, this.pre);
    container.append(this.details);
  }

  update(call, running) {
    this.name.textContent = call.name;
    this.state.textContent = running ? "writing arguments" : "";
    this.pre.firstElementChild.textContent = prettyJson(call.arguments);
  }
}

function codeText(text) {
  const pre = element("pre");
  pre.tabIndex = 0; // so that the keyboard can scroll it sideways
  pre.append(element("code", "", text));
  return pre;
}

/** JSON with indentation; text that is no JSON (yet) as it is. */
function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function thinkingLabel(reply) {
  if (reply.state === "thinking") return `Thinking… ${reply.thinkingSeconds.toFixed(0)} s`;
  return `Thought for ${reply.thinkingSeconds.toFixed(1)} s`;
}

function statsText(reply) {
  if (!reply.tokens) return "";
  const parts = [`${reply.tokens} ${reply.tokens === 1 ? "token" : "tokens"}`];
  if (reply.tokensPerSecond) parts.push(`${reply.tokensPerSecond.toFixed(1)} tokens/s`);
  if (reply.steps) parts.push(`${acceptanceLength(reply).toFixed(2)} tokens a step`);
  return parts.join(" · ");
}
