// The logs of a build: output as it comes, follow and pause, lines that are fetched when they are
// wanted, and addresses of lines. What is missing of a log is a .gap element with the first and the
// last line that are not there; one always stands before the newest lines.
import { find } from "./find.js";

const MOST_LINES = 2000;
const NEAR_END = 40; // pixels
const LINE = /^#step-(\d{1,4})-L(\d{1,9})$/;
// Of each log: whether it is paused, and what came meanwhile.
const states = new WeakMap();

function stateOf(log) {
  if (!states.has(log)) states.set(log, { paused: false, held: [], top: 0 });
  return states.get(log);
}

const stepOf = (element) => element.closest("[data-step]");
const logOf = (step) => step.querySelector(".log");
const toGo = (log) => log.scrollHeight - log.scrollTop - log.clientHeight;
const atEnd = (log) => toGo(log) < NEAR_END;
const isRunning = (step) => step.querySelector(".step-line").dataset.state === "running";
const newest = (log) => log.querySelector(":scope > .lines:not(.window)");
const several = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// New output ---------------------------------------------------------------------------------------
export function append(region, message) {
  for (const part of message.steps) {
    const step = region.querySelector(`[data-step="${part.step}"]`);
    if (!step) continue;
    const log = logOf(step);
    if (stateOf(log).paused) hold(log, part);
    else add(log, part);
    showFollow(step);
  }
  region.dataset.after = message.seq;
}

// Nothing moves under the eyes of who is reading; of very much only the end is kept, as ever.
function hold(log, part) {
  const { held } = stateOf(log);
  const count = part.lines.split("<span data-n=").length - 1;
  if (part.dropped) held.length = 0;
  held.push({ ...part, count });
  let kept = held.reduce((sum, one) => sum + one.count, 0);
  while (kept > MOST_LINES && held.length > 1) {
    kept -= held.shift().count;
    held[0].dropped ||= 1;
  }
}

function add(log, part) {
  const lines = newest(log);
  // Lines between were left out, so what is there is no more in a row with what comes.
  if (part.dropped) lines.replaceChildren();
  lines.insertAdjacentHTML("beforeend", part.lines);
  while (lines.childElementCount > MOST_LINES) lines.firstElementChild.remove();
  const tail = log.querySelector(".tail");
  tail.innerHTML = part.tail;
  tail.dataset.n = part.next;
  measure(lines.previousElementSibling, Number(lines.firstElementChild?.dataset.n ?? part.next) - 1);
  if (!stateOf(log).paused) toEnd(log);
}

function toEnd(log) {
  log.scrollTop = log.scrollHeight;
  stateOf(log).top = log.scrollTop;
}

function measure(gap, last) {
  if (last === Number(gap.dataset.last)) return;
  gap.dataset.last = last;
  const count = last - Number(gap.dataset.first) + 1;
  gap.hidden = count <= 0;
  gap.querySelector("[data-count]").textContent = count.toLocaleString("en");
}

// Follow and pause ---------------------------------------------------------------------------------
function pause(log, paused) {
  const state = stateOf(log);
  const step = stepOf(log);
  state.paused = paused;
  if (paused) {
    step.dataset.touched = "";
  } else {
    for (const part of state.held.splice(0)) add(log, part);
    toEnd(log);
  }
  showFollow(step);
}

function showFollow(step) {
  const button = step.querySelector("[data-follow]");
  const { paused, held } = stateOf(logOf(step));
  const count = held.reduce((sum, part) => sum + part.count, 0);
  const more = held.some((part) => part.dropped) ? "more than " : "";
  const text = paused ? (count ? `Follow (${more}${several(count, "new line")})` : "Follow") : "Pause";
  if (button.textContent !== text) button.textContent = text;
  button.toggleAttribute("data-paused", paused);
  button.toggleAttribute("data-held", held.length > 0);
}

function scrolled(log) {
  const state = stateOf(log);
  const up = log.scrollTop < state.top - 2;
  state.top = log.scrollTop;
  const step = stepOf(log);
  if (state.paused) {
    // Back at the end, with nothing held back: followed again. Else the button says how much came.
    if (!up && atEnd(log) && !state.held.length) pause(log, false);
  } else if (up && toGo(log) > 2 && isRunning(step)) {
    // At the first pixels of it: a scroll takes some frames, and output that came between two of
    // them would take the reader back to the end. (A log that has become higher stays at its end.)
    pause(log, true);
  }
}

// Lines that are not there -------------------------------------------------------------------------
async function fill(gap, at) {
  const step = stepOf(gap);
  const log = logOf(step);
  const url = new URL(step.dataset.lines, location.href);
  const { first, last } = gap.dataset;
  url.search = new URLSearchParams({ first, last, at });
  gap.dataset.busy = "";
  try {
    const answer = await fetch(url, { headers: { "HX-Request": "true" } });
    if (!answer.ok || answer.redirected) throw new Error(answer.statusText);
    const html = await answer.text();
    if (!gap.isConnected) return;
    const holder = document.createElement("template");
    holder.innerHTML = html;
    // The log may have grown while the lines were on their way.
    const after = holder.content.lastElementChild;
    const before = log.scrollHeight - log.scrollTop;
    const keep = gap.getBoundingClientRect().top < log.getBoundingClientRect().top + log.clientHeight / 2 && at === last;
    if (gap.dataset.last !== last) measure(after, Number(gap.dataset.last));
    gap.replaceWith(holder.content);
    if (keep) log.scrollTop = log.scrollHeight - before;
    stateOf(log).top = log.scrollTop;
  } catch {
    delete gap.dataset.busy;
    gap.querySelector("span:last-child").textContent = "The console didn't respond. Try again.";
  }
}

// A line by its address ----------------------------------------------------------------------------
function lineIn(log, number) {
  return log.querySelector(`[data-n="${number}"]`);
}

export async function goTo(region, stepNumber, number) {
  const step = region.querySelector(`[data-step="${stepNumber}"]`);
  if (!step) return null;
  step.open = true;
  step.dataset.touched = "";
  const log = logOf(step);
  if (isRunning(step)) pause(log, true);
  if (!lineIn(log, number)) {
    const gap = [...log.querySelectorAll(".gap")].find(
      ({ dataset }) => Number(dataset.first) <= number && number <= Number(dataset.last),
    );
    if (gap) await fill(gap, String(number));
  }
  const line = lineIn(log, number);
  if (line) target(region, step, line);
  return line;
}

function target(region, step, line) {
  for (const old of region.querySelectorAll(".log .target")) old.classList.remove("target");
  for (const button of region.querySelectorAll("[data-link]")) button.hidden = true;
  // A very long line is shown in pieces, which have the same number.
  for (const piece of logOf(step).querySelectorAll(`[data-n="${line.dataset.n}"]`)) piece.classList.add("target");
  const link = step.querySelector("[data-link]");
  link.hidden = false;
  link.dataset.copy = `${location.origin}${location.pathname}#step-${step.dataset.step}-L${line.dataset.n}`;
  const log = logOf(step);
  const place = line.getBoundingClientRect().top - log.getBoundingClientRect().top;
  log.scrollTop += place - log.clientHeight / 3;
  stateOf(log).top = log.scrollTop;
  log.scrollIntoView({ block: "nearest" });
}

function fromAddress(region) {
  const named = LINE.exec(location.hash);
  if (named) goTo(region, named[1], Number(named[2]));
  else if (/^#step-\d{1,4}$/.test(location.hash)) document.querySelector(location.hash)?.setAttribute("open", "");
}

// Clicks -------------------------------------------------------------------------------------------
async function copyOf(button) {
  const answer = await fetch(button.dataset.copyUrl);
  if (answer.ok) button.dispatchEvent(new CustomEvent("copy-text", { bubbles: true, detail: await answer.text() }));
}

function clicked(region, event) {
  const follow = event.target.closest("[data-follow]");
  const gapLink = event.target.closest(".gap a");
  const copier = event.target.closest("[data-copy-url]");
  const line = event.target.closest(".log [data-n]");
  if (follow) {
    const log = logOf(stepOf(follow));
    pause(log, !stateOf(log).paused);
  } else if (gapLink) {
    event.preventDefault();
    const gap = gapLink.closest(".gap");
    if (!("busy" in gap.dataset)) fill(gap, gap.dataset[gapLink.dataset.at]);
  } else if (copier) {
    copyOf(copier);
  } else if (line && event.clientX - line.getBoundingClientRect().left < parseFloat(getComputedStyle(line).paddingLeft)) {
    const step = stepOf(line);
    history.replaceState(null, "", `#step-${step.dataset.step}-L${line.dataset.n}`);
    goTo(region, step.dataset.step, line.dataset.n);
  }
}

export function logs(region) {
  region.addEventListener("click", (event) => clicked(region, event));
  // A scroll does not bubble.
  region.addEventListener("scroll", (event) => {
    if (event.target.matches?.(".step .log")) scrolled(event.target);
  }, { capture: true, passive: true });
  region.addEventListener("toggle", (event) => {
    const log = event.target.open && event.target.matches(".step") && logOf(event.target);
    if (log && !stateOf(log).paused && !log.querySelector(".target")) toEnd(log);
  }, { capture: true });
  for (const log of region.querySelectorAll(".step[open] .log")) toEnd(log);
  window.addEventListener("hashchange", () => fromAddress(region));
  fromAddress(region);
  find(region, goTo);
}
