// Before the first paint: the theme that was chosen here last, so that nothing flashes.
(() => {
  try {
    const theme = localStorage.getItem("theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage may be barred; then the system's theme is the right one.
  }
})();
