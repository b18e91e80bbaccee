// What every page does. Pages work without it; this makes them quicker and live.
import { connect } from "./live.js";
import { logs } from "./log.js";
import { recipe } from "./recipe.js";
import { shell } from "./shell.js";
import { keepTimes } from "./times.js";

const root = document.documentElement;
const typing = (element) => element.closest?.("input, textarea, select, [contenteditable]");

// Theme ------------------------------------------------------------------------------------------
function themes() {
  const buttons = [...document.querySelectorAll("[data-theme-choice]")];
  const show = () => {
    const now = root.dataset.theme ?? "system";
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.themeChoice === now));
    }
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const choice = button.dataset.themeChoice;
      if (choice === "system") delete root.dataset.theme;
      else root.dataset.theme = choice;
      try {
        localStorage.setItem("theme", choice);
      } catch {
        // Then it holds for this page only.
      }
      show();
    });
    button.parentElement.hidden = false;
  }
  show();
}

// Copy buttons -----------------------------------------------------------------------------------
function copy(button) {
  const source = button.dataset.copyFrom && document.getElementById(button.dataset.copyFrom);
  return copyText(button, source ? source.textContent : button.dataset.copy);
}

async function copyText(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text);
  }
  button.dataset.copied = "";
  const label = button.getAttribute("aria-label");
  button.setAttribute("aria-label", "Copied");
  setTimeout(() => {
    delete button.dataset.copied;
    if (label === null) button.removeAttribute("aria-label");
    else button.setAttribute("aria-label", label);
  }, 1600);
}

// On plain http inside a network there is no clipboard API.
function copyBySelection(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "sr";
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// Filter of a list -------------------------------------------------------------------------------
function filter() {
  for (const input of document.querySelectorAll("[data-filter]")) {
    const wanted = input.value.trim().toLowerCase();
    const rows = [...(document.getElementById(input.dataset.filter)?.children ?? [])];
    for (const row of rows) row.hidden = !row.dataset.text.includes(wanted);
    const none = rows[0]?.closest(".card").querySelector("[data-filter-none]");
    if (none) none.hidden = rows.some((row) => !row.hidden);
    input.closest("[data-filter-box]").hidden = false;
  }
}

// Clicks and keys --------------------------------------------------------------------------------
document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-copy], [data-copy-from], [data-dialog], [data-close]");
  if (!target) return;
  if (target.dataset.dialog) {
    event.preventDefault();
    const dialog = document.getElementById(target.dataset.dialog);
    dialog.showModal();
    // What a dialog shows of now is asked for now.
    for (const part of dialog.querySelectorAll("[hx-trigger=opened]")) htmx.trigger(part, "opened");
  } else if ("close" in target.dataset) {
    const dialog = target.closest("dialog");
    if (!dialog) return;
    event.preventDefault();
    dialog.close();
  } else {
    copy(target);
  }
});

document.addEventListener("copy-text", (event) => copyText(event.target, event.detail));

document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const filterBox = document.querySelector("[data-filter]");
  if (event.key === "Escape" && event.target === filterBox) {
    filterBox.value = "";
    filter();
    filterBox.blur();
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.target.closest("[data-recipe-form]")?.requestSubmit();
  } else if (!typing(event.target) && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const find = filterBox ?? document.querySelector("[data-find]");
    if (event.key === "/" && find) {
      event.preventDefault();
      find.focus();
    } else if (event.key === "n") {
      document.querySelector("[data-key='n']")?.click();
    }
  }
});

document.addEventListener("input", (event) => {
  if (event.target.matches("[data-filter]")) filter();
});

// A form that is under way is not sent twice; the page is left anyway once it is answered. What its
// dialog asked for of now is not waited for: after a deletion there is none to ask about.
document.addEventListener("submit", (event) => {
  const form = event.target;
  for (const part of form.querySelectorAll("[hx-trigger=opened]")) htmx.trigger(part, "htmx:abort");
  if (form.method !== "post" || form.hasAttribute("hx-post")) return;
  if (form.dataset.sent) event.preventDefault();
  form.dataset.sent = "1";
});
window.addEventListener("pageshow", () => {
  for (const form of document.forms) delete form.dataset.sent;
});

themes();
filter();
keepTimes();
for (const form of document.querySelectorAll("[data-recipe-form]")) recipe(form);
for (const box of document.querySelectorAll("[data-shell]")) shell(box);
for (const region of document.querySelectorAll("[data-build]")) logs(region);
for (const region of document.querySelectorAll("[data-live]")) {
  connect(region, () => {
    filter();
    keepTimes();
  });
}
