/** The page: the conversation, what the reader does with it, and the one reply that may be running. */

import { copyText } from "./clipboard.js";
import { ReplyBuilder, isWhole, newReply, requestMessages } from "./reply.js";
import { isSettingsOpen, openSettings, requestFields, settings, spokenFields, startSettings } from "./settings.js";
import { MOST_SECONDS, Player, Recorder, playWav, pushPcm } from "./sound.js";
import { loadApiKey, loadTurns, saveTurns } from "./store.js";
import { ChatError, listModels, streamChat } from "./stream.js";
import { AssistantView, isSendKey, openEditor, toolTurn, userTurn } from "./view.js";

const SAVE_EVERY_MS = 1000; // while a reply runs
const SHOW_COPIED_MS = 1500;
const SPOKEN_CHARACTERS = 600; // of a finished reply, for screen readers; the rest is there to be read
const NEAR_BOTTOM_PX = 80; // so close to the end, the view follows a growing reply

const find = (id) => document.getElementById(id);
const page = {
  scroll: find("conversation"),
  welcome: find("welcome"),
  turns: find("turns"),
  latest: find("latest"),
  composer: find("composer"),
  prompt: find("prompt"),
  send: find("send"),
  stop: find("stop"),
  record: find("record"),
  speak: find("speak"),
  model: find("model"),
  unsaved: find("unsaved"),
  announcer: find("announcer"),
};

let turns = loadTurns();
let model = "";
let hasSound = false; // whether the model hears and speaks
let recorder = null; // while the microphone is on
let running = null; // {controller, finished} of the reply that streams
let following = true; // whether the view stays at the end of a growing reply

// The conversation

function showTurns() {
  page.turns.replaceChildren(...turns.map(turnNode));
  page.welcome.hidden = turns.length > 0;
}

function keepTurns() {
  page.unsaved.hidden = saveTurns(turns);
}

function turnNode(turn) {
  if (turn.role === "user") return userTurn(turn, userActions(turn));
  if (turn.role === "tool") return toolTurn(turn);
  const view = new AssistantView(assistantActions(turn));
  view.update(turn, awaitsResults(turn));
  return view.node;
}

function awaitsResults(turn) {
  const hasCalls = turn.toolCalls.length > 0 && turn.toolCalls.every(isWhole);
  return turn.state === "done" && hasCalls && turns.at(-1) === turn;
}

function userActions(turn) {
  return {
    copy: (button) => copyFrom(button, turn.content),
    play: () => playWav(turn.audio.data),
    edit: (node) => openEditor(node, turn.content, (text) => sendEdited(turn, text), () => closeEditor(node, turn)),
  };
}

function assistantActions(turn) {
  return {
    copy: (button) => copyFrom(button, turn.content),
    play: () => playReply(turn),
    retry: () => answerAfter(turns.indexOf(turn)),
    enterKey: () => openSettings("api-key"),
    sendResults: (results) => sendResults(turn, results),
  };
}

function closeEditor(node, turn) {
  const plain = turnNode(turn);
  node.replaceWith(plain);
  plain.querySelector("button:last-of-type").focus();
}

function sendMessage(text, audio = null) {
  turns.push(audio ? { role: "user", content: text, audio } : { role: "user", content: text });
  answerAfter(turns.length);
}

function sendEdited(turn, text) {
  const index = turns.indexOf(turn);
  turns[index] = { role: "user", content: text };
  answerAfter(index + 1);
}

function sendResults(turn, results) {
  turn.toolCalls.forEach((call, index) => {
    turns.push({ role: "tool", toolCallId: call.id, name: call.name, content: results[index] });
  });
  answerAfter(turns.length);
}

/** Keep the first `count` turns and ask for the next one. */
async function answerAfter(count) {
  await stopReply();
  turns.length = count;
  showTurns();
  const reply = newReply();
  turns.push(reply);
  const view = new AssistantView(assistantActions(reply));
  page.turns.append(view.node);
  following = true;
  page.prompt.focus();
  const controller = new AbortController();
  running = { controller, finished: runReply(reply, view, controller.signal) };
}

async function stopReply() {
  if (!running) return;
  running.controller.abort();
  await running.finished;
}

async function startAnew() {
  await stopReply();
  turns = [];
  keepTurns();
  showTurns();
  announce("New conversation");
  page.prompt.focus();
}

// One reply

async function runReply(reply, view, signal) {
  const painter = new Painter(() => paint(reply, view));
  showRunning(true);
  announce("Waiting for the reply");
  painter.request();
  try {
    await receive(reply, painter, signal);
    reply.state = "done";
  } catch (error) {
    endEarly(reply, error);
  } finally {
    painter.cancel();
    running = null;
    paint(reply, view);
    showRunning(false);
    keepTurns();
  }
  announceEnd(reply);
}

async function receive(reply, painter, signal) {
  if (!model) await findModel();
  const player = hasSound && settings.speak ? new Player() : null;
  signal.addEventListener("abort", () => player?.stop());
  const builder = new ReplyBuilder(reply, (data) => player && pushPcm(player, data));
  for await (const chunk of streamChat(requestBody(reply), loadApiKey(), signal)) {
    builder.add(chunk);
    painter.request();
  }
}

function requestBody(reply) {
  return {
    model,
    messages: requestMessages(turns.slice(0, turns.indexOf(reply)), settings.systemPrompt),
    stream: true,
    stream_options: { include_usage: true, token_details: true },
    ...requestFields(),
    ...(hasSound && settings.speak ? spokenFields() : {}),
  };
}

function playReply(reply) {
  const player = new Player();
  for (const data of reply.audio.pieces) pushPcm(player, data);
}

function endEarly(reply, error) {
  if (error.name === "AbortError") {
    reply.state = "stopped";
    return;
  }
  reply.state = "failed";
  if (!(error instanceof ChatError)) throw error;
  reply.error = { kind: error.kind, title: error.title, detail: error.detail };
}

/** Draws at most once a frame, and saves the conversation now and then. */
class Painter {
  constructor(draw) {
    this.draw = draw;
    this.frame = 0;
    this.savedAt = performance.now();
  }

  request() {
    this.frame ||= requestAnimationFrame((now) => {
      this.frame = 0;
      this.draw();
      if (now - this.savedAt < SAVE_EVERY_MS) return;
      this.savedAt = now;
      keepTurns();
    });
  }

  cancel() {
    cancelAnimationFrame(this.frame);
  }
}

function paint(reply, view) {
  view.update(reply, awaitsResults(reply));
  if (following) scrollToEnd();
}

function showRunning(isRunning) {
  const stopHadFocus = document.activeElement === page.stop;
  page.send.hidden = isRunning;
  page.stop.hidden = !isRunning;
  if (stopHadFocus) page.prompt.focus();
}

// What screen readers hear: the beginning and the end of a reply, not each token

function announce(text) {
  page.announcer.textContent = text;
}

function announceEnd(reply) {
  if (reply.error) {
    announce(`${reply.error.title}. ${reply.error.detail}`);
    return;
  }
  const calls = reply.toolCalls.map((call) => `Calls ${call.name}.`).join(" ");
  const text = reply.content.slice(0, SPOKEN_CHARACTERS);
  announce(`${reply.state === "stopped" ? "Reply stopped." : "Reply complete."} ${text} ${calls}`.trim());
}

async function copyFrom(button, text) {
  await copyText(text);
  announce("Copied");
  const label = button.querySelector("span") ?? button;
  label.textContent = "Copied";
  setTimeout(() => (label.textContent = "Copy"), SHOW_COPIED_MS);
}

// The model

async function findModel() {
  const [served] = await listModels(loadApiKey());
  model = served.id;
  hasSound = (served.input_modalities ?? []).includes("audio");
  page.record.hidden = page.speak.hidden = !hasSound;
  page.model.textContent = model;
  document.title = `${model} · openmimo`;
}

async function showModel() {
  model = "";
  try {
    await findModel();
  } catch (error) {
    if (!(error instanceof ChatError)) throw error;
    page.model.textContent = error.title;
  }
}

// Events

function submitPrompt() {
  const text = page.prompt.value;
  if (!text.trim() || running) return;
  page.prompt.value = "";
  sendMessage(text);
}

// The microphone

async function startRecording() {
  const starting = new Recorder();
  try {
    await starting.start();
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    announce("The microphone is not available");
    showRecording("No microphone", false);
    return;
  }
  recorder = starting;
  announce("Recording");
  showTime();
}

/** Stop, and send the recording with the text of the message field, or drop it. */
async function endRecording(isSent) {
  const ending = recorder;
  recorder = null;
  showRecording("Record", false);
  const audio = await ending.stop();
  announce(isSent ? "Recording sent" : "Recording dropped");
  if (!isSent || !audio.seconds) return;
  const text = page.prompt.value;
  page.prompt.value = "";
  sendMessage(text.trim() ? text : "", audio);
}

function showTime() {
  if (!recorder) return;
  if (recorder.seconds >= MOST_SECONDS) {
    endRecording(true);
    return;
  }
  showRecording(`Send ${recorder.seconds.toFixed(0)} s`, true);
  setTimeout(showTime, 200);
}

function showRecording(label, isOn) {
  page.record.setAttribute("aria-pressed", String(isOn));
  page.record.querySelector("span").textContent = label;
}

function scrollToEnd() {
  page.scroll.scrollTop = page.scroll.scrollHeight;
}

function watchScroll() {
  const distance = page.scroll.scrollHeight - page.scroll.scrollTop - page.scroll.clientHeight;
  following = distance < NEAR_BOTTOM_PX;
  page.latest.hidden = following;
}

function listenToComposer() {
  page.composer.addEventListener("submit", (event) => {
    event.preventDefault();
    submitPrompt();
  });
  page.prompt.addEventListener("keydown", (event) => {
    if (!isSendKey(event)) return;
    event.preventDefault();
    submitPrompt();
  });
  page.stop.addEventListener("click", stopReply);
  page.record.addEventListener("click", () => (recorder ? endRecording(true) : startRecording()));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || isSettingsOpen()) return;
    if (recorder) endRecording(false);
    else stopReply();
  });
}

function listenToConversation() {
  page.turns.addEventListener("click", (event) => {
    const button = event.target.closest(".copy-code");
    if (button) copyFrom(button, button.closest("figure").querySelector("code").textContent);
  });
  for (const starter of page.welcome.querySelectorAll("button")) {
    starter.addEventListener("click", () => sendMessage(starter.textContent));
  }
  find("new").addEventListener("click", startAnew);
  page.scroll.addEventListener("scroll", watchScroll);
  page.latest.addEventListener("click", scrollToEnd);
  // The composer grows with its text, and a phone's keyboard takes half of the screen.
  new ResizeObserver(() => following && scrollToEnd()).observe(page.scroll);
  window.addEventListener("pagehide", () => running && keepTurns());
}

startSettings(showModel);
showTurns();
listenToComposer();
listenToConversation();
showModel();
scrollToEnd();
