/**
 * Markdown to DOM nodes, for text from a model. markdown-it parses it, with HTML off; this file builds the nodes from its
 * tokens. Every character of the text enters the page through a text node, and links lead only to http and https, so
 * nothing in the text can become markup.
 *
 * A string of marks accompanies the text, one per character: "0", or "1" to "3" where the text came from an accepted
 * draft of that position. Marked text sits in a span whose class the style sheet can tint. The tokens of the parser carry
 * no columns, so `Source` finds each piece of text again, in order.
 */

import MarkdownIt from "./vendor/markdown-it.js";

const MAX_NESTING = 48; // levels of quotes, lists and emphasis; a block that nests deeper is shown as written
const MAX_BLOCK = 20_000; // characters; a longer block is shown as written, since inline parsing may be quadratic
const WINDOW = 4096; // characters of syntax that may separate two pieces of text

const TAGS = {
  paragraph_open: "p",
  blockquote_open: "blockquote",
  bullet_list_open: "ul",
  ordered_list_open: "ol",
  list_item_open: "li",
  thead_open: "thead",
  tbody_open: "tbody",
  tr_open: "tr",
  td_open: "td",
  em_open: "em",
  strong_open: "strong",
  s_open: "del",
};

/** Splits a text into blocks without reading what is inside them. */
const blockParser = newParser();
blockParser.core.ruler.enableOnly(["normalize", "block"]);

/** Parses one block. Escapes and entities stay tokens of their own, which `Source` can find. */
const parser = newParser();
parser.core.ruler.disable("text_join");

function newParser() {
  const markdown = new MarkdownIt({ html: false, linkify: true, maxNesting: MAX_NESTING });
  // While a reply streams, underlined headings would change the line above them, and references the text before them.
  markdown.disable(["lheading", "reference"]);
  markdown.validateLink = (address) => safeAddress(address) !== null;
  markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
  for (const schema of ["mailto:", "ftp:", "//"]) markdown.linkify.add(schema, null);
  return markdown;
}

/** The rendered form of one growing text: blocks that did not change keep their nodes, selection and scroll. */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.keys = [];
  }

  update(text, marks) {
    const blocks = splitBlocks(text, marks);
    blocks.forEach((block, index) => {
      const key = `${block.kind}\n${block.text}\n${block.marks}`;
      if (this.keys[index] === key) return;
      const node = buildBlock(block);
      if (index < this.keys.length) this.container.children[index].replaceWith(node);
      else this.container.append(node);
      this.keys[index] = key;
    });
    while (this.container.children.length > blocks.length) this.container.lastElementChild.remove();
    this.keys.length = blocks.length;
  }
}

/** The outermost blocks, as {kind, text, marks}. */
function splitBlocks(text, marks) {
  const starts = [0];
  for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) starts.push(at + 1);
  starts.push(text.length + 1);
  // The parser ends lines at "\r", too: as a space it keeps both lines and columns.
  return blockParser
    .parse(text.replaceAll("\r", " "), {})
    .filter((token) => token.level === 0 && token.map)
    .map((token) => {
      const [start, end] = [starts[token.map[0]], starts[token.map[1]] - 1];
      const kind = token.type === "fence" ? fenceKind(token) : token.type;
      return { kind, text: text.slice(start, end).replaceAll("\r", " "), marks: marks.slice(start, end) };
    });
}

/** Whether a fence is closed can show in nothing but the number of its lines. */
function fenceKind(token) {
  const numLines = token.content.split("\n").length - 1;
  return numLines + 2 > token.map[1] - token.map[0] ? "open fence" : "fence";
}

function buildBlock(block) {
  const source = new Source(block.text, block.marks);
  const isCode = block.kind.endsWith("fence") || block.kind === "code_block";
  const tokens = block.text.length <= MAX_BLOCK || isCode ? parser.parse(block.text, {}) : [];
  if (!tokens.length || tokens.some((token) => token.level + 1 >= MAX_NESTING)) {
    const paragraph = element("p");
    appendText(paragraph, source, block.text);
    return paragraph;
  }
  const root = document.createDocumentFragment();
  build(root, tokens, source);
  return root.firstElementChild;
}

/** Append the nodes of `tokens` to `root`. */
function build(root, tokens, source) {
  const open = [root];
  for (const token of tokens) {
    const parent = open.at(-1);
    if (token.nesting < 0) {
      open.pop();
    } else if (token.nesting > 0) {
      open.push(container(parent, token));
    } else if (token.type === "inline") {
      build(parent, token.children, source);
    } else {
      appendLeaf(parent, token, source);
    }
  }
}

/** The new element that holds what follows until the token's counterpart. */
function container(parent, token) {
  let outer = null;
  let node = null;
  if (token.type === "heading_open") {
    // The page's own titles are h1 and h2: those of a message come below them.
    node = element(`h${Math.min(Number(token.tag[1]) + 2, 6)}`);
  } else if (token.type === "link_open") {
    node = anchor(token.attrGet("href"));
  } else if (token.type === "table_open") {
    outer = element("div", "table");
    outer.tabIndex = 0; // so that the keyboard can scroll it sideways
    node = element("table");
    outer.append(node);
  } else if (token.type === "th_open") {
    node = element("th");
    node.scope = "col";
  } else {
    node = element(TAGS[token.type] ?? "span");
    const start = token.type === "ordered_list_open" ? token.attrGet("start") : null;
    if (start !== null) node.start = Number(start);
  }
  parent.append(outer ?? node);
  return node;
}

function appendLeaf(parent, token, source) {
  switch (token.type) {
    case "hr":
      parent.append(element("hr"));
      break;
    case "fence":
    case "code_block":
      parent.append(codeFigure(token, source));
      break;
    case "code_inline": {
      const code = element("code");
      appendText(code, source, token.content);
      parent.append(code);
      break;
    }
    case "softbreak":
    case "hardbreak":
      parent.append("\n");
      break;
    case "image": {
      // Shown as a link, since the page loads nothing from outside.
      const node = anchor(token.attrGet("src"));
      build(node, token.children, source);
      if (!node.textContent.trim()) node.textContent = node.href;
      parent.append(node);
      break;
    }
    case "text_special":
      appendText(parent, source, token.content, token.markup);
      break;
    default:
      appendText(parent, source, token.content);
  }
}

function codeFigure(token, source) {
  const figure = element("figure", "code");
  const caption = element("figcaption");
  const name = element("span");
  const info = token.info.trim();
  name.textContent = info.split(/\s/)[0] || "text";
  source.find(info);
  const copy = element("button", "copy-code");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.setAttribute("aria-label", "Copy code");
  caption.append(name, copy);
  const pre = element("pre");
  pre.tabIndex = 0; // so that the keyboard can scroll it sideways
  const code = element("code");
  token.content.replace(/\n$/, "").split("\n").forEach((line, index) => {
    if (index) code.append("\n");
    appendText(code, source, line);
  });
  code.normalize();
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

/** The text of a block with its marks, read from front to back. */
class Source {
  constructor(text, marks) {
    this.text = text;
    this.marks = marks;
    this.at = 0;
  }

  /** The marks of the next occurrence of `written`; the empty string where there is none. */
  find(written) {
    const offset = this.text.slice(this.at, this.at + written.length + WINDOW).indexOf(written);
    if (offset < 0) return "";
    const start = this.at + offset;
    this.at = start + written.length;
    return this.marks.slice(start, this.at);
  }
}

/**
 * Append plain text, each run of accepted draft tokens in a span of class "drafted". written: how the source has the text,
 * if it is an escape or an entity.
 */
function appendText(parent, source, text, written = text) {
  if (!text) return;
  const found = source.find(written);
  const marks = found.length === text.length ? found : (found[0] ?? "0").repeat(text.length);
  for (const match of marks.matchAll(/(.)\1*/gs)) {
    const part = text.slice(match.index, match.index + match[0].length);
    if (match[1] === "0") {
      parent.append(part);
    } else {
      const span = element("span", "drafted");
      span.dataset.position = match[1];
      span.append(part);
      parent.append(span);
    }
  }
}

function safeAddress(address) {
  if (!URL.canParse(address)) return null;
  const url = new URL(address);
  return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
}

function anchor(address) {
  const node = element("a");
  node.href = safeAddress(address);
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}

function element(tag, className = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  return node;
}
