// The live side of a page: a WebSocket whose messages carry HTML made by the page's own partials.
// See orkestr_console/ui/live.py for the messages.
import { append } from "./log.js";

const FIRST_WAIT = 300;
const LONGEST_WAIT = 15000;
const SIGNED_OUT = 4401;
const FOREIGN = 4404;
const MORE = "+"; // what a frame begins with whose message goes on in the next

export function connect(region, changed) {
  const away = document.getElementById("live");
  let wait = FIRST_WAIT;
  let leaving = false;

  const open = () => {
    const url = new URL(region.dataset.live, location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    if (region.dataset.after) url.searchParams.set("after", region.dataset.after);
    const socket = new WebSocket(url);
    let queue = Promise.resolve();
    let begun = "";
    socket.onmessage = (event) => {
      wait = FIRST_WAIT;
      delete away.dataset.away;
      if (event.data.startsWith(MORE)) {
        begun += event.data.slice(1);
        return;
      }
      const message = JSON.parse(begun + event.data);
      begun = "";
      queue = queue.then(() => take(region, message)).then(changed);
    };
    socket.onclose = (event) => {
      if (leaving || event.code === FOREIGN) return;
      if (event.code === SIGNED_OUT) {
        location.reload();
        return;
      }
      // A restart is over before a person could read that it happened.
      if (wait > FIRST_WAIT) away.dataset.away = "";
      setTimeout(open, wait * (0.75 + Math.random() / 2));
      wait = Math.min(wait * 2, LONGEST_WAIT);
    };
  };
  window.addEventListener("pagehide", () => { leaving = true; });
  // Shown again from the back-forward cache, the page has no socket and is old.
  window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
  open();
}

async function take(region, message) {
  if (message.kind === "swap") await swap(message.html);
  else if (message.kind === "append") append(region, message);
  else if (message.kind === "gone") gone(region);
}

async function swap(html) {
  const holder = document.createElement("template");
  holder.innerHTML = html;
  for (const fresh of [...holder.content.children]) {
    const old = document.getElementById(fresh.id);
    if (!old || old.isEqualNode(fresh)) continue;
    if (fresh.classList.contains("step-line")) turn(old, fresh);
    await htmx.swap({ sourceElement: old, target: old, swap: "outerMorph", text: fresh.outerHTML, transition: false });
  }
}

// A step opens when it runs and closes when it went well, unless the person took it in hand.
function turn(old, fresh) {
  const details = old.closest("details");
  const state = fresh.dataset.state;
  if (old.dataset.state === state || "touched" in details.dataset) return;
  details.open = state === "running" || state === "failed";
}

document.addEventListener("click", (event) => {
  const details = event.target.closest("summary")?.parentElement;
  if (details) details.dataset.touched = "1";
});

function gone(region) {
  const banner = document.createElement("div");
  banner.className = "banner notices";
  banner.setAttribute("role", "status");
  banner.append("This was deleted. You're seeing its last state.");
  region.prepend(banner);
}
