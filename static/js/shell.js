// The command box: Enter runs, Up and Down walk through what was run in this tab before.
const KEPT = 100;

export function shell(box) {
  const form = box.querySelector("form");
  const field = form.elements.command;
  const log = box.querySelector(".shell-log");
  const key = `commands of ${box.dataset.shell}`;
  let history = remembered(key);
  let at = history.length;
  let draft = "";

  const recall = (step) => {
    const next = at + step;
    if (next < 0 || next > history.length) return;
    if (at === history.length) draft = field.value;
    at = next;
    field.value = at === history.length ? draft : history[at];
    field.setSelectionRange(field.value.length, field.value.length);
  };

  field.addEventListener("keydown", (event) => {
    if (event.isComposing || event.altKey) return;
    const oneLine = !field.value.includes("\n");
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      const run = form.querySelector("#run");
      if (field.value.trim() !== "" && !run.disabled) form.requestSubmit();
    } else if (event.key === "ArrowUp" && (oneLine || at < history.length)) {
      event.preventDefault();
      recall(-1);
    } else if (event.key === "ArrowDown" && at < history.length) {
      event.preventDefault();
      recall(1);
    }
  });

  form.addEventListener("htmx:before:request", () => {
    const command = field.value;
    if (history.at(-1) !== command) history.push(command);
    history = history.slice(-KEPT);
    at = history.length;
    try {
      sessionStorage.setItem(key, JSON.stringify(history));
    } catch {
      // Then they are remembered until the page is left.
    }
  });

  // Cleared only once it was answered, and not if it was refused: nothing typed is lost.
  const answered = () => {
    const entry = log.lastElementChild;
    if (entry?.matches(".entry:not([data-failed])")) field.value = "";
    log.scrollTop = log.scrollHeight;
    field.focus();
  };
  log.addEventListener("htmx:after:swap", answered);
  form.addEventListener("htmx:after:swap", answered);
  form.addEventListener("htmx:error", () => {
    note(log, "The console didn't respond, so the command may or may not have run. It's still in the box.");
  });

  const suggestions = box.querySelector("[data-suggestions]");
  suggestions.hidden = false;
  suggestions.addEventListener("click", (event) => {
    const chip = event.target.closest("[data-command]");
    if (!chip || form.querySelector("#run").disabled) return;
    field.value = chip.dataset.command;
    form.requestSubmit();
  });
}

function remembered(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key)) ?? [];
  } catch {
    return [];
  }
}

function note(log, sentence) {
  const entry = document.createElement("div");
  entry.className = "entry";
  entry.dataset.failed = "";
  const end = document.createElement("div");
  end.className = "entry-end";
  const words = document.createElement("span");
  words.className = "bad";
  words.textContent = sentence;
  end.append(words);
  entry.append(end);
  log.append(entry);
  log.scrollTop = log.scrollHeight;
}
