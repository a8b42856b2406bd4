/**
 * Markdown to DOM nodes, for text that nobody has vetted: every character reaches the page through a text node, so
 * nothing in the text can become markup, and links lead only to http and https.
 *
 * Beside the text runs a string of marks, one character a character: "0", or "1" to "3" where the text came from an
 * accepted draft of that position. Marked text sits in a span whose class the style sheet can tint.
 */

const MAX_DEPTH = 24; // of nested quotes, lists and emphasis; deeper text is shown as written
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}|$)/;
const ITEM_IN_PARAGRAPH = /^ {0,3}([-*+]|1[.)]) +\S/; // a line that begins with "1986." is no list
const TABLE_RULE = /^[\s|:-]*$/;
const LINK = /\[([^[\]\n]*)\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+["'][^"'\n]*["'])?\s*\)/y;
const BARE_LINK = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,:;!?)\]}*_~]/y;
const ESCAPE = /\\([!-/:-@[-`{-~])/y;

/** A text with its marks; slices of both stay side by side. */
class Marked {
  constructor(text, marks) {
    this.text = text;
    this.marks = marks;
  }

  slice(start, end) {
    return new Marked(this.text.slice(start, end), this.marks.slice(start, end));
  }

  lines() {
    const lines = [];
    let start = 0;
    for (const line of this.text.split("\n")) {
      lines.push(this.slice(start, start + line.length));
      start += line.length + 1;
    }
    return lines;
  }

  static join(lines) {
    return new Marked(lines.map((line) => line.text).join("\n"), lines.map((line) => line.marks).join("0"));
  }
}

/** The rendered form of one growing text: blocks that did not change keep their nodes, selection and scroll. */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.keys = [];
  }

  update(text, marks) {
    const blocks = splitBlocks(new Marked(text, marks).lines(), 0);
    blocks.forEach((block, index) => {
      const key = `${block.kind}\n${block.key}`;
      if (this.keys[index] === key) return;
      const node = block.build();
      if (index < this.keys.length) this.container.children[index].replaceWith(node);
      else this.container.append(node);
      this.keys[index] = key;
    });
    while (this.container.children.length > blocks.length) this.container.lastElementChild.remove();
    this.keys.length = blocks.length;
  }
}

// Blocks

function isBlank(line) {
  return line.text.trim() === "";
}

/** Whether the line ends the paragraph before it. */
function startsBlock(lines, index) {
  const text = lines[index].text;
  return (
    FENCE.test(text) ||
    HEADING.test(text) ||
    RULE.test(text) ||
    QUOTE.test(text) ||
    ITEM_IN_PARAGRAPH.test(text) ||
    startsTable(lines, index)
  );
}

function startsTable(lines, index) {
  const [header, rule] = lines.slice(index, index + 2);
  if (!rule || !header.text.includes("|") || !TABLE_RULE.test(rule.text)) return false;
  const dashes = cells(rule);
  return dashes.length === cells(header).length && dashes.every((cell) => /^:?-+:?$/.test(cell.text));
}

/** Lines -> [{kind, key, build}]: `key` changes whenever the node that `build` returns would. */
function splitBlocks(lines, depth) {
  const blocks = [];
  let index = 0;
  while (index < lines.length) {
    if (isBlank(lines[index])) {
      index += 1;
      continue;
    }
    const [kind, end, build] = nextBlock(lines, index, depth);
    const source = Marked.join(lines.slice(index, end));
    blocks.push({ kind, key: `${source.text}\n${source.marks}`, build });
    index = end;
  }
  return blocks;
}

function nextBlock(lines, index, depth) {
  const text = lines[index].text;
  if (FENCE.test(text)) return codeBlock(lines, index);
  if (HEADING.test(text)) return ["heading", index + 1, () => heading(lines[index], depth)];
  if (RULE.test(text)) return ["rule", index + 1, () => element("hr")];
  if (depth < MAX_DEPTH && QUOTE.test(text)) return quoteBlock(lines, index, depth);
  if (depth < MAX_DEPTH && ITEM.test(text)) return listBlock(lines, index, depth);
  if (startsTable(lines, index)) return tableBlock(lines, index, depth);
  let end = index + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines, end)) end += 1;
  return ["paragraph", end, () => withInline("p", Marked.join(lines.slice(index, end)), depth)];
}

function appendBlocks(parent, lines, depth) {
  for (const block of splitBlocks(lines, depth)) parent.append(block.build());
  return parent;
}

function heading(line, depth) {
  const [opening, hashes] = HEADING.exec(line.text);
  const title = trimmed(line.slice(opening.length));
  let end = title.text.length;
  while (title.text[end - 1] === "#") end -= 1;
  const isClosed = end === 0 || title.text[end - 1] === " "; // "# One #", but not "# C#"
  // The page's own titles are h1 and h2: those of a message come below them.
  return withInline(`h${Math.min(hashes.length + 2, 6)}`, isClosed ? trimmed(title.slice(0, end)) : title, depth);
}

function codeBlock(lines, index) {
  const [, fence, info] = FENCE.exec(lines[index].text);
  const closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}\\s*$`);
  let end = index + 1;
  while (end < lines.length && !closing.test(lines[end].text)) end += 1;
  const body = Marked.join(lines.slice(index + 1, end));
  const closed = end < lines.length;
  return [closed ? "code" : "open code", closed ? end + 1 : end, () => codeFigure(body, info.trim().split(/\s/)[0])];
}

function codeFigure(body, language) {
  const figure = element("figure", "code");
  const caption = element("figcaption");
  const name = element("span");
  name.textContent = language || "text";
  const copy = element("button", "copy-code");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.setAttribute("aria-label", "Copy code");
  caption.append(name, copy);
  const pre = element("pre");
  pre.tabIndex = 0; // so that the keyboard can scroll it sideways
  const code = element("code");
  appendText(code, body);
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

function quoteBlock(lines, index, depth) {
  let end = index;
  const inner = [];
  while (end < lines.length && QUOTE.test(lines[end].text)) {
    inner.push(lines[end].slice(QUOTE.exec(lines[end].text)[0].length));
    end += 1;
  }
  return ["quote", end, () => appendBlocks(element("blockquote"), inner, depth + 1)];
}

function listBlock(lines, index, depth) {
  const kindOf = (marker) => marker.at(-1);
  const [, , firstMarker] = ITEM.exec(lines[index].text);
  const items = [];
  let indent = 0;
  let end = index;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const item = ITEM.exec(line.text);
    const continues = line.text.search(/\S/) >= indent;
    if (items.length && (isBlank(line) || continues)) {
      items.at(-1).push(isBlank(line) ? line : line.slice(indent));
    } else if (item && kindOf(item[2]) === kindOf(firstMarker) && !RULE.test(line.text)) {
      indent = item[1].length + item[2].length + Math.max(item[3].length, 1);
      items.push([line.slice(indent)]);
    } else if (item || isBlank(lines[end - 1]) || startsBlock(lines, end)) {
      break;
    } else {
      items.at(-1).push(line); // a paragraph's next line, not indented
    }
  }
  return ["list", end, () => list(items, firstMarker, depth)];
}

function list(items, firstMarker, depth) {
  const ordered = /\d/.test(firstMarker);
  const node = element(ordered ? "ol" : "ul");
  if (ordered) node.start = Number.parseInt(firstMarker, 10);
  for (const lines of items) node.append(appendBlocks(element("li"), lines, depth + 1));
  return node;
}

function tableBlock(lines, index, depth) {
  let end = index + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].text.includes("|")) end += 1;
  return ["table", end, () => table(lines[index], lines.slice(index + 2, end), depth)];
}

function table(header, rows, depth) {
  const node = element("table");
  const columns = cells(header).length;
  const appendRow = (section, line, tag) => {
    const row = element("tr");
    for (const cell of cells(line).slice(0, columns)) row.append(withInline(tag, cell, depth));
    section.append(row);
  };
  const head = element("thead");
  appendRow(head, header, "th");
  for (const cell of head.firstElementChild.children) cell.scope = "col";
  const body = element("tbody");
  for (const line of rows) appendRow(body, line, "td");
  node.append(head, body);
  const frame = element("div", "table");
  frame.tabIndex = 0; // so that the keyboard can scroll it sideways
  frame.append(node);
  return frame;
}

function cells(line) {
  const parts = [];
  let start = 0;
  for (let at = 0; at <= line.text.length; at += 1) {
    if (at < line.text.length && (line.text[at] !== "|" || line.text[at - 1] === "\\")) continue;
    parts.push(trimmed(line.slice(start, at)));
    start = at + 1;
  }
  if (parts[0].text === "") parts.shift();
  if (parts.length > 1 && parts.at(-1).text === "") parts.pop();
  return parts;
}

// Inside a block

function withInline(tag, source, depth) {
  const node = element(tag);
  appendInline(node, source, depth);
  return node;
}

/** Append `source` to `parent`, reading escapes, code, links, emphasis and strike-through. */
function appendInline(parent, source, depth) {
  const { text } = source;
  const closers = new Closers(text);
  let plainFrom = 0;
  let at = 0;
  while (at < text.length) {
    const span = depth < MAX_DEPTH ? inlineAt(source, at, closers, depth) : null;
    if (span) {
      appendText(parent, source.slice(plainFrom, at));
      span.append(parent);
      at = span.end;
      plainFrom = at;
    } else {
      at += text[at] === "`" || text[at] === "~" ? runLength(text, at) : 1;
    }
  }
  appendText(parent, source.slice(plainFrom));
}

/** The span that opens at `at`, as {end, append(parent)}, or null. */
function inlineAt(source, at, closers, depth) {
  const { text } = source;
  const character = text[at];
  if (character === "\\" && matchAt(ESCAPE, text, at)) {
    return { end: at + 2, append: (parent) => appendText(parent, source.slice(at + 1, at + 2)) };
  }
  if (character === "`") return codeSpan(source, at, closers);
  if (character === "[" || (character === "!" && text[at + 1] === "[")) return link(source, at, depth);
  if (character === "h" && !/\w/.test(text[at - 1] ?? " ")) return bareLink(source, at);
  if (character === "*" || character === "_" || character === "~") return emphasis(source, at, closers, depth);
  return null;
}

function codeSpan(source, at, closers) {
  const width = runLength(source.text, at);
  const close = closers.find("`", width, at + width);
  if (close < 0) return null;
  const append = (parent) => {
    const code = element("code");
    appendText(code, source.slice(at + width, close));
    parent.append(code);
  };
  return { end: close + width, append };
}

function link(source, at, depth) {
  // An image is shown as a link, since the page loads nothing from outside.
  const open = source.text[at] === "!" ? at + 1 : at;
  const match = matchAt(LINK, source.text, open);
  const address = match && safeAddress(match[2]);
  if (!address) return null;
  const label = source.slice(open + 1, open + 1 + match[1].length);
  const append = (parent) => {
    const node = anchor(address);
    if (label.text.trim()) appendInline(node, label, MAX_DEPTH);
    else node.textContent = address;
    parent.append(node);
  };
  return { end: open + match[0].length, append };
}

function bareLink(source, at) {
  const match = matchAt(BARE_LINK, source.text, at);
  const address = match && safeAddress(match[0]);
  if (!address) return null;
  const end = at + match[0].length;
  const append = (parent) => {
    const node = anchor(address);
    appendText(node, source.slice(at, end));
    parent.append(node);
  };
  return { end, append };
}

function safeAddress(address) {
  if (!URL.canParse(address)) return null;
  const url = new URL(address);
  return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
}

function anchor(address) {
  const node = element("a");
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}

function emphasis(source, at, closers, depth) {
  const { text } = source;
  const character = text[at];
  const run = runLength(text, at);
  const width = Math.min(run, 2);
  if (character === "~" && run !== 2) return null;
  if (character === "_" && /\w/.test(text[at - 1] ?? " ")) return null; // snake_case is no emphasis
  if (/\s/.test(text[at + run] ?? " ")) return null;
  const close = closers.find(character, width, at + run);
  if (close < 0) return null;
  const tag = character === "~" ? "del" : width === 2 ? "strong" : "em";
  const append = (parent) => parent.append(withInline(tag, source.slice(at + width, close), depth + 1));
  return { end: close + width, append };
}

/** Finds closing delimiters; a search that failed once is not made again, so hostile text costs linear time. */
class Closers {
  constructor(text) {
    this.text = text;
    this.failed = new Set();
  }

  /** Where the `width` characters that close start, at or after `from`; -1 if they do not come. */
  find(character, width, from) {
    const kind = character + width;
    if (this.failed.has(kind)) return -1;
    let at = this.text.indexOf(character, from);
    while (at >= 0) {
      const run = runLength(this.text, at);
      if (this.closes(character, width, at, run)) return at + run - width;
      at = this.text.indexOf(character, at + run);
    }
    this.failed.add(kind);
    return -1;
  }

  closes(character, width, at, run) {
    if (character === "`") return run === width;
    if (run !== width && run < 3) return false;
    if (/\s/.test(this.text[at - 1] ?? " ")) return false;
    return character !== "_" || !/\w/.test(this.text[at + run] ?? " ");
  }
}

// Nodes

function element(tag, className = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  return node;
}

/** Append plain text, each run of accepted draft tokens in a span of class "drafted". */
function appendText(parent, source) {
  for (const match of source.marks.matchAll(/(.)\1*/gs)) {
    const text = source.text.slice(match.index, match.index + match[0].length);
    if (match[1] === "0") {
      parent.append(text);
    } else {
      const span = element("span", "drafted");
      span.dataset.position = match[1];
      span.append(text);
      parent.append(span);
    }
  }
}

function trimmed(source) {
  const lead = source.text.length - source.text.trimStart().length;
  return source.slice(lead, Math.max(lead, source.text.trimEnd().length));
}

function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}
