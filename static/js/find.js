// Search over the output of all steps of a build. The server looks; this shows what it found and
// goes from one hit to the next.
const PAUSE = 250; // milliseconds without a key before it is asked
const MARKED = "found";

export function find(region, goTo) {
  const form = region.querySelector("[data-log-search]");
  const field = form.querySelector("[data-find]");
  const panel = region.querySelector("[data-found]");
  const list = panel.querySelector("[data-found-list]");
  const count = panel.querySelector("[data-found-count]");
  let asked = "";
  let at = -1;
  let timer = 0;
  let request = null;
  let looking = Promise.resolve();

  const hits = () => [...list.querySelectorAll("[data-line-hit]")];
  const total = () => list.querySelector("[data-count]")?.dataset;

  const say = () => {
    const { count: all, many } = total() ?? {};
    if (!all) count.textContent = asked.trim() === "" ? "" : "No hit";
    else count.textContent = `${at < 0 ? "" : `${at + 1} of `}${many === undefined ? "" : "more than "}${Number(all).toLocaleString("en")} line${all === "1" ? "" : "s"}`;
  };

  const close = () => {
    request?.abort();
    asked = "";
    at = -1;
    list.replaceChildren();
    panel.hidden = true;
    mark(null, "");
  };

  const ask = async (after = null) => {
    request?.abort();
    request = new AbortController();
    const url = new URL(form.action);
    url.search = new URLSearchParams({ q: asked, ...after });
    try {
      const answer = await fetch(url, { headers: { "HX-Request": "true" }, signal: request.signal });
      if (!answer.ok || answer.redirected) throw new Error(answer.statusText);
      return await answer.text();
    } catch (error) {
      if (error.name === "AbortError") return null;
      return "<p class=found-none>The console did not answer; try again.</p>";
    }
  };

  const look = async () => {
    clearTimeout(timer);
    if (field.value === asked) return;
    asked = field.value;
    if (asked.trim() === "") {
      close();
      return;
    }
    const html = await ask();
    if (html === null) return;
    list.replaceChildren(parsed(html));
    at = -1;
    panel.hidden = false;
    say();
  };

  const more = async () => {
    const last = hits().at(-1);
    const html = await ask({ step: last.dataset.stepHit, line: last.dataset.lineHit });
    if (html === null) return;
    list.querySelector("ol").append(...parsed(html).querySelectorAll("li"));
  };

  const show = async (index) => {
    const all = hits();
    if (!all.length) return;
    at = index;
    for (const hit of all) hit.removeAttribute("aria-current");
    const hit = all[at];
    hit.setAttribute("aria-current", "true");
    list.scrollTop += hit.getBoundingClientRect().top - list.getBoundingClientRect().top - list.clientHeight / 3;
    say();
    history.replaceState(null, "", `#step-${hit.dataset.stepHit}-L${hit.dataset.lineHit}`);
    mark(await goTo(region, hit.dataset.stepHit, Number(hit.dataset.lineHit)), asked);
  };

  const step = async (by) => {
    await looking;
    const all = hits();
    if (at + by >= all.length && all.length < Number(total()?.count)) await more();
    const length = hits().length;
    if (length) await show((at + by + length) % length);
  };

  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(() => { looking = look(); }, PAUSE);
  };
  field.addEventListener("input", soon);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value !== asked) looking = look();
    step(1);
  });
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && event.shiftKey) {
      event.preventDefault();
      step(-1);
    } else if (event.key === "Escape") {
      field.value = "";
      close();
      field.blur();
    }
  });
  panel.addEventListener("click", (event) => {
    const button = event.target.closest("[data-find-step]");
    const hit = event.target.closest("[data-line-hit]");
    if (button) step(Number(button.dataset.findStep));
    else if (event.target.closest("[data-find-close]")) {
      field.value = "";
      close();
    } else if (hit && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
      event.preventDefault();
      show(hits().indexOf(hit));
    }
  });
}

function parsed(html) {
  const holder = document.createElement("template");
  holder.innerHTML = html;
  return holder.content;
}

// What was found in a line, highlighted without touching the line (CSS Custom Highlight API).
function mark(line, wanted) {
  if (!("highlights" in CSS)) return;
  CSS.highlights.delete(MARKED);
  if (!line || !wanted) return;
  const nodes = [];
  const walker = document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
  let text = "";
  while (walker.nextNode()) {
    nodes.push([text.length, walker.currentNode]);
    text += walker.currentNode.data;
  }
  const place = (offset) => {
    const [start, node] = nodes.findLast(([from]) => from <= offset);
    return [node, Math.min(offset - start, node.length)];
  };
  const low = text.toLowerCase();
  const highlight = new Highlight();
  for (let from = low.indexOf(wanted.toLowerCase()); from >= 0; from = low.indexOf(wanted.toLowerCase(), from + wanted.length)) {
    const range = new Range();
    range.setStart(...place(from));
    range.setEnd(...place(Math.min(from + wanted.length, text.length)));
    highlight.add(range);
  }
  CSS.highlights.set(MARKED, highlight);
}
