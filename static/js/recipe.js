// The recipe editor: a gutter that numbers steps, a live count, and examples filled in place.
// The rules are those of templates_app/forms.py.
function steps(text) {
  const lines = text.split("\n");
  if (text.startsWith("#!")) return lines.map((_, index) => index === 0);
  let goesOn = false;
  let fence = 0; // how many backticks end the step that is one of several lines
  let first = false;
  return lines.map((line) => {
    const backticks = line.match(/^(`{3,})[^`]*$/)?.[1].length ?? 0;
    if (fence) {
      const ends = backticks >= fence && line.trimEnd() === "`".repeat(backticks);
      const begins = first && !ends;
      first = false;
      if (ends) fence = 0;
      return begins;
    }
    if (!goesOn && backticks) {
      [fence, first] = [backticks, true];
      return false;
    }
    const begins = !goesOn && line.trim() !== "" && !line.trimStart().startsWith("#");
    goesOn = (goesOn || begins) && line.endsWith("\\");
    return begins;
  });
}

export function recipe(form) {
  const area = form.querySelector("textarea[name=recipe]");
  const gutter = form.querySelector(".recipe-gutter");
  const count = form.querySelector("[data-step-count]");
  const most = Number(count.dataset.most);

  const show = () => {
    let number = 0;
    gutter.textContent = steps(area.value).map((begins) => (begins ? (number += 1) : "")).join("\n");
    gutter.scrollTop = area.scrollTop;
    const many = number > most;
    const words = number === 1 ? "1 step" : `${number} steps`;
    count.textContent = many ? `${words}: at most ${most} are allowed` : words;
    count.toggleAttribute("data-many", many);
  };

  gutter.hidden = false;
  area.addEventListener("input", show);
  area.addEventListener("scroll", () => { gutter.scrollTop = area.scrollTop; });
  form.addEventListener("click", (event) => {
    const chip = event.target.closest("[data-preset-recipe]");
    if (!chip) return;
    event.preventDefault();
    // Nothing typed is lost: an example is added to what is there.
    const typed = area.value.trim() === "" ? "" : `${area.value.trimEnd()}\n`;
    if (!typed) form.elements.base_template.value = chip.dataset.presetBase;
    area.focus();
    area.value = `${typed}${chip.dataset.presetRecipe}\n`;
    show();
  });
  show();
}
