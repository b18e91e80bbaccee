"use strict";
// The process in which the JavaScript kernel runs code; kernel.py, beside it, starts it as
//   node --expose-internals runner.cjs REQUESTS ANSWERS
// with the descriptors of requests and answers, a line of JSON each:
//   {"op": "run", "code", "number"}  →  any of {"kind": "display" | "result", "data"} and
//                                       {"kind": "error", …}, then {"kind": "done"}
// What the code prints goes to descriptors 1 and 2 and is complete before "done".  SIGINT interrupts
// what runs.
//
// A run is a script in the main context.  Its top-level declarations become global variables, so
// that later runs see them and may declare them again; with a top-level await, the rest of it is
// wrapped in an async function (as Node's own REPL does).

const fs = require("node:fs");
const { createRequire, isBuiltin } = require("node:module");
const net = require("node:net");
const path = require("node:path");
const { createInterface } = require("node:readline");
const { pathToFileURL } = require("node:url");
const util = require("node:util");
const vm = require("node:vm");
// The parser that Node's REPL uses.
const acorn = require("internal/deps/acorn/acorn/dist/acorn");

const [REQUESTS, ANSWERS] = process.argv.splice(2).map(Number);
// A little more than is shown, so that whoever shows it notices (inside_outputs.py).
const MAX_TEXT = 257 * 1024;
const MAX_DATA = 8 * 1024 * 1024;
const INSPECT = { depth: 4, maxArrayLength: 200, maxStringLength: MAX_TEXT, breakLength: 80 };
const PNG = Buffer.from([0x89, 0x50, 0x4e, 0x47]);
const DISPLAY = Symbol.for("Jupyter.display");
const PARSING = {
  ecmaVersion: "latest",
  allowAwaitOutsideFunction: true,
  allowImportExportEverywhere: true,
};
const INTERRUPTED = "ERR_SCRIPT_EXECUTION_INTERRUPTED";
const DECLARATIONS = new Set(["const", "let", "var"]);
const here = process.cwd();
// User code may replace these.
const { stringify, parse } = JSON;
const { writeSync } = fs;
const exit = process.exit.bind(process);

function answer(line) {
  let rest = Buffer.from(stringify(line) + "\n");
  while (rest.length > 0) rest = rest.subarray(writeSync(ANSWERS, rest));
}

// Preparing code ------------------------------------------------------------------------------

// The names that a pattern (ESTree) declares.
function namesIn(pattern) {
  switch (pattern && pattern.type) {
    case "Identifier":
      return [pattern.name];
    case "ObjectPattern":
      return pattern.properties.flatMap((each) => namesIn(each.value || each.argument));
    case "ArrayPattern":
      return pattern.elements.flatMap(namesIn);
    case "AssignmentPattern":
      return namesIn(pattern.left);
    case "RestElement":
      return namesIn(pattern.argument);
    default:
      return [];
  }
}

// Whether a node has an await, or a `for await`, that belongs to the top level.
function awaits(node) {
  if (Array.isArray(node)) return node.some(awaits);
  if (!node || typeof node.type !== "string") return false;
  if (node.type === "AwaitExpression" || (node.type === "ForOfStatement" && node.await)) return true;
  if (/Function/.test(node.type)) return false;
  return Object.values(node).some((value) => typeof value === "object" && awaits(value));
}

// `import a, {b as c} from "m"` as an assignment of what `import("m")` gives.
function importing(node) {
  const module = `await import(${stringify(node.source.value)})`;
  const space = node.specifiers.find((each) => each.type === "ImportNamespaceSpecifier");
  const named = node.specifiers
    .filter((each) => each !== space)
    .map((each) => {
      const imported = each.imported ? (each.imported.name ?? each.imported.value) : "default";
      return `${stringify(imported)}: ${each.local.name}`;
    });
  const parts = [];
  if (space) parts.push(`${space.local.name} = ${module}`);
  if (named.length > 0) parts.push(`({${named.join(", ")}} = ${module})`);
  return `${parts.join(", ") || module};`;
}

// Code to be run as a script, how many characters were added before it, and what it gives back.
class Preparation {
  constructor(code) {
    this.code = code;
    this.body = acorn.parse(code, PARSING).body;
    this.edits = [];
    this.names = new Set();
    const last = this.body[this.body.length - 1];
    this.hasValue = Boolean(last) && last.type === "ExpressionStatement";
    this.isAsync = this.body.some((node) => node.type === "ImportDeclaration" || awaits(node));
    this.prologue = "";
    for (const node of this.body) this.prepare(node);
    if (this.isAsync && this.hasValue) {
      // The statement's ends: its expression's are inside of parentheses around it.
      const end = code[last.end - 1] === ";" ? last.end - 1 : last.end;
      this.replace(last.start, last.start, "return { value: (");
      this.replace(end, last.end, ") };");
    }
  }

  replace(start, end, text) {
    this.edits.push({ start, end, text });
  }

  prepare(node) {
    if (node.type === "ExportNamedDeclaration" && node.declaration) {
      this.replace(node.start, node.declaration.start, "");
      node = node.declaration;
    }
    if (node.type === "ImportDeclaration") {
      for (const each of node.specifiers) this.names.add(each.local.name);
      // What is before it may have no semicolon.
      this.replace(node.start, node.end, `;${importing(node)}`);
    } else if (node.type === "ClassDeclaration") {
      this.names.add(node.id.name);
      this.replace(node.start, node.start, this.isAsync ? `${node.id.name} = ` : `var ${node.id.name} = `);
      this.replace(node.end, node.end, ";");
    } else if (node.type === "FunctionDeclaration" && this.isAsync) {
      this.names.add(node.id.name);
      this.prologue += `globalThis.${node.id.name} = ${node.id.name}; `;
    } else if (node.type === "VariableDeclaration" && DECLARATIONS.has(node.kind)) {
      this.declare(node);
    }
  }

  declare(node) {
    const keyword = node.start + node.kind.length;
    if (!this.isAsync) {
      // As many characters, for the positions in tracebacks.  `let x;` sets it, unlike `var x;`.
      this.replace(node.start, keyword, "var".padEnd(node.kind.length));
    } else {
      // What is before it, or after it, may have no semicolon, and would go on at a parenthesis.
      this.replace(node.start, keyword, ";");
    }
    const last = node.declarations[node.declarations.length - 1];
    for (const each of node.declarations) {
      const { id, init, start, end } = each;
      for (const name of namesIn(id)) this.names.add(name);
      const unset = init || node.kind === "var" ? "" : " = undefined";
      if (this.isAsync) this.replace(start, start, "(");
      if (unset) this.replace(end, end, unset);
      if (this.isAsync) this.replace(end, end, each === last ? ");" : ")");
    }
  }

  finish() {
    let text = this.code;
    // The last first, and what is at the same place in the order in which it was added.
    const edits = this.edits.map((edit, index) => ({ ...edit, index }));
    edits.sort((a, b) => b.start - a.start || b.index - a.index);
    for (const { start, end, text: added } of edits) {
      text = text.slice(0, start) + added + text.slice(end);
    }
    if (!this.isAsync) return { text, added: 0 };
    const names = [...this.names];
    const declared = names.length > 0 ? `var ${names.join(", ")}; ` : "";
    const before = `${declared}(async () => { ${this.prologue}`;
    return { text: `${before}${text}\n})()`, added: before.length };
  }
}

// Code as a script.  Throws SyntaxError.
function prepared(code, filename) {
  let preparation;
  try {
    preparation = new Preparation(code);
  } catch (error) {
    // V8's own message shows the place.
    compile(code, filename, 0);
    throw error;
  }
  const { text, added } = preparation.finish();
  return { ...preparation, script: compile(text, filename, -added) };
}

function compile(text, filename, columnOffset) {
  const { USE_MAIN_CONTEXT_DEFAULT_LOADER: standard } = vm.constants ?? {};
  const importModuleDynamically = standard ?? ((specifier) => import(located(specifier)));
  return new vm.Script(text, { filename, columnOffset, importModuleDynamically });
}

// Where an older Node finds a module, seen from the working directory.
function located(specifier) {
  if (isBuiltin(specifier) || /^[a-z]+:/i.test(specifier)) return specifier;
  return pathToFileURL(fromHere.resolve(specifier)).href;
}

// Running it ------------------------------------------------------------------------------------

let stop = null;

async function settled(promise) {
  const interruption = new Promise((_, reject) => {
    stop = () => reject(Object.assign(new Error("interrupted"), { code: INTERRUPTED }));
  });
  // It may never settle, or fail once nobody waits for it any more.
  promise.catch(() => {});
  try {
    return await Promise.race([promise, interruption]);
  } finally {
    stop = null;
  }
}

async function run(code, number) {
  const filename = path.join(here, `run-${number}.js`);
  try {
    const { script, isAsync, hasValue } = prepared(code, filename);
    let value = script.runInThisContext({ breakOnSigint: true, displayErrors: false });
    if (isAsync) value = (await settled(value))?.value;
    // Programs end in `main()`, and what that prints belongs to the run.
    if (hasValue && util.types.isPromise(value)) value = await settled(value);
    if (hasValue && value !== undefined) await show(value, "result");
  } catch (error) {
    answer({ kind: "error", ...described(error, code, filename) });
  }
}

function described(error, code, filename) {
  if (error && error.code === INTERRUPTED) {
    const value = "The code was interrupted; the context keeps its variables.";
    return { name: "Interrupted", value, traceback: [`Interrupted: ${value}`] };
  }
  if (!util.types.isNativeError(error) && !(error instanceof Error)) {
    const value = inspected(error);
    return { name: "Uncaught", value, traceback: [`Uncaught ${value}`] };
  }
  const name = String(error.name || "Error");
  const value = String(error.message);
  return { name, value, traceback: traceback(error, `${name}: ${value}`, code, filename) };
}

function isTheirs(line) {
  return !line.includes(__filename) && !/^\s+at .*\bnode:/.test(line);
}

// The line of the code, and the stack without the frames of this file and of Node.
function traceback(error, title, code, filename) {
  const stack = String(error.stack || title).split("\n");
  const lines = stack.filter(isTheirs);
  const cause = error.cause === undefined ? [] : [`[cause]: ${inspected(error.cause)}`].flatMap((text) => text.split("\n")).filter(isTheirs);
  const place = lines.find((line) => line.includes(`${filename}:`));
  const [, row, column] = place?.slice(place.indexOf(filename) + filename.length).match(/^:(\d+)(?::(\d+))?/) ?? [];
  const source = row && error.name !== "SyntaxError" ? code.split("\n")[row - 1] : undefined;
  if (source === undefined) return [...lines, ...cause];
  const mark = column && column <= source.length + 1 ? [`${" ".repeat(column - 1)}^`] : [];
  return [`${filename}:${row}`, source, ...mark, "", ...lines, ...cause];
}

// Showing values --------------------------------------------------------------------------------

function inspected(value) {
  try {
    return util.inspect(value, INSPECT).slice(0, MAX_TEXT);
  } catch (error) {
    return `[${typeof value} that cannot be shown: ${error?.message}]`;
  }
}

function isPng(value) {
  return value instanceof Uint8Array && PNG.equals(Buffer.from(value.buffer, value.byteOffset, 4 <= value.length ? 4 : 0));
}

// A value in the representations that there are of it, by their media types.
async function representations(value) {
  if (typeof value?.[DISPLAY] === "function") return { ...(await value[DISPLAY]()) };
  const data = { "text/plain": inspected(value) };
  if (isPng(value)) data["image/png"] = base64(value);
  return data;
}

function base64(bytes) {
  return typeof bytes === "string" ? bytes : Buffer.from(bytes).toString("base64");
}

async function show(value, kind) {
  send(await representations(value), kind);
}

function send(data, kind) {
  for (const [type, value] of Object.entries(data)) {
    if (value instanceof Uint8Array) data[type] = base64(value);
  }
  if (stringify(data).length > MAX_DATA) {
    data = { "text/plain": "[This is too large to be shown.]" };
  }
  answer({ kind, data });
}

// `display(value)`, or `display(bundle, {raw: true})` with representations by their media types.
function display(value, { raw = false } = {}) {
  if (raw) return send({ ...value }, "display");
  if (typeof value?.[DISPLAY] !== "function") {
    const data = { "text/plain": inspected(value) };
    if (isPng(value)) data["image/png"] = base64(value);
    return send(data, "display");
  }
  return show(value, "display");
}
for (const [name, type] of [
  ["text", "text/plain"],
  ["html", "text/html"],
  ["svg", "image/svg+xml"],
  ["json", "application/json"],
]) {
  display[name] = (value) => send({ [type]: value }, "display");
}
display.png = (bytes) => send({ "image/png": base64(bytes) }, "display");

// The process -----------------------------------------------------------------------------------

const fromHere = createRequire(path.join(here, "code.js"));
const provided = { display, require: fromHere, module: { exports: {} }, exports: {}, __dirname: here };
for (const [name, value] of Object.entries(provided)) {
  Object.defineProperty(globalThis, name, { value, writable: true, configurable: true });
}

// Otherwise what a full pipe doesn't take is written once the code has ended, if it ever does.
for (const stream of [process.stdout, process.stderr]) stream._handle?.setBlocking?.(true);
process.on("SIGINT", () => stop?.());
// Of timers and of promises that nobody awaits: they are told, and the variables stay.
process.on("uncaughtException", (error) => console.error("Uncaught", error));
process.on("unhandledRejection", (reason) => console.error("Uncaught (in promise)", reason));

async function main() {
  const requests = new net.Socket({ fd: REQUESTS, readable: true, writable: false });
  for await (const line of createInterface({ input: requests, crlfDelay: Infinity })) {
    const { code, number } = parse(line);
    await run(code, number);
    answer({ kind: "done" });
  }
  exit(0);
}
main();
