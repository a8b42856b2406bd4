/** What outlives a reload: the conversation and settings in localStorage, the API key only in this tab's session. */

import { isRunning } from "./reply.js";

// The number is that of the form: what an older page kept in another form is not read.
const TURNS = "openmimo.turns.1";
const SETTINGS = "openmimo.settings.1";
const THEME = "openmimo.theme";
const API_KEY = "openmimo.apiKey";

/** Empty strings leave the choice to the server. */
export const DEFAULT_SETTINGS = {
  systemPrompt: "",
  temperature: "",
  topP: "",
  topK: "",
  maxTokens: "",
  seed: "",
  tools: "",
  thinking: false,
  tint: false,
  speak: false,
};

/** Sound is not kept: a minute of it would fill the storage of the browser. */
const withoutSound = (name, value) => (name === "data" || name === "pieces" ? undefined : value);

export function loadTurns() {
  const turns = read(TURNS, []);
  for (const turn of turns) {
    if (turn.role === "assistant" && isRunning(turn)) turn.state = "stopped"; // cut off by the reload
  }
  return turns;
}

/** Returns whether the browser had room for the conversation. */
export function saveTurns(turns) {
  try {
    localStorage.setItem(TURNS, JSON.stringify(turns, withoutSound));
    return true;
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    return false;
  }
}

export function loadSettings() {
  return { ...DEFAULT_SETTINGS, ...read(SETTINGS, {}) };
}

export function saveSettings(settings) {
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}

export function loadTheme() {
  return localStorage.getItem(THEME);
}

export function saveTheme(theme) {
  localStorage.setItem(THEME, theme);
}

export function loadApiKey() {
  return sessionStorage.getItem(API_KEY) ?? "";
}

export function saveApiKey(key) {
  sessionStorage.setItem(API_KEY, key);
}

function read(name, fallback) {
  const text = localStorage.getItem(name);
  return text === null ? fallback : JSON.parse(text);
}
