/** The settings: the dialog, the two toggles next to the message, and the theme. */

import { DEFAULT_SETTINGS, loadApiKey, loadSettings, loadTheme, saveApiKey, saveSettings, saveTheme } from "./store.js";

const DARK = matchMedia("(prefers-color-scheme: dark)");
const REQUEST_NUMBERS = [
  ["temperature", "temperature"],
  ["top_p", "topP"],
  ["top_k", "topK"],
  ["max_tokens", "maxTokens"],
  ["seed", "seed"],
];

const find = (id) => document.getElementById(id);
const dialog = find("settings");
const form = find("settings-form");

export const settings = loadSettings();

/** The fields that the settings add to a request; what is empty is left to the server. */
export function requestFields() {
  const fields = { chat_template_kwargs: { enable_thinking: settings.thinking } };
  for (const [field, name] of REQUEST_NUMBERS) {
    if (settings[name] !== "") fields[field] = Number(settings[name]);
  }
  if (settings.tools.trim()) fields.tools = JSON.parse(settings.tools);
  return fields;
}

/** The fields that ask for a spoken reply, where the model speaks. */
export function spokenFields() {
  return { modalities: ["text", "audio"], audio: { format: "pcm16" } };
}

export function isSettingsOpen() {
  return dialog.open;
}

export function openSettings(fieldId) {
  fillForm(settings);
  form.elements.apiKey.value = loadApiKey();
  dialog.showModal();
  find(fieldId).focus();
}

/** Connect the controls. onNewKey is called after the API key was changed. */
export function startSettings(onNewKey) {
  showTheme(loadTheme());
  showToggles();
  find("theme").addEventListener("click", flipTheme);
  DARK.addEventListener("change", () => showTheme());
  find("thinking").addEventListener("click", () => flip("thinking"));
  find("tint").addEventListener("click", () => flip("tint"));
  find("speak").addEventListener("click", () => flip("speak"));
  find("open-settings").addEventListener("click", () => openSettings("system-prompt"));
  find("cancel-settings").addEventListener("click", () => dialog.close());
  find("reset-settings").addEventListener("click", () => fillForm(DEFAULT_SETTINGS));
  form.elements.tools.addEventListener("input", checkTools);
  form.addEventListener("submit", () => applyForm(onNewKey));
}

function fillForm(values) {
  for (const field of form.elements) {
    if (field.name in values) field.value = values[field.name];
  }
  checkTools();
}

function applyForm(onNewKey) {
  for (const field of form.elements) {
    if (field.name in DEFAULT_SETTINGS) settings[field.name] = field.value;
  }
  saveSettings(settings);
  const key = form.elements.apiKey.value.trim();
  if (key === loadApiKey()) return;
  saveApiKey(key);
  onNewKey();
}

function checkTools() {
  form.elements.tools.setCustomValidity(toolsProblem(form.elements.tools.value));
}

function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "The tools must be a JSON array.";
  } catch (error) {
    return `The tools are not valid JSON: ${error.message}`;
  }
}

function flip(name) {
  settings[name] = !settings[name];
  saveSettings(settings);
  showToggles();
}

function showToggles() {
  find("thinking").setAttribute("aria-pressed", String(settings.thinking));
  find("tint").setAttribute("aria-pressed", String(settings.tint));
  find("speak").setAttribute("aria-pressed", String(settings.speak));
  find("legend").hidden = !settings.tint;
  document.body.classList.toggle("tinted", settings.tint);
}

function flipTheme() {
  const theme = isDark() ? "light" : "dark";
  saveTheme(theme);
  showTheme(theme);
}

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  find("theme").setAttribute("aria-pressed", String(isDark()));
}

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : DARK.matches;
}
