// Keeps <time data-relative> current; the server wrote the same words when it made the page.
const UNITS = [[86400, "d"], [3600, "h"], [60, "min"]];

function words(seconds) {
  const unit = UNITS.find(([length]) => seconds >= length);
  return unit ? `${Math.floor(seconds / unit[0])}\u202f${unit[1]}` : `${Math.floor(seconds)}\u202fs`;
}

export function keepTimes() {
  for (const time of document.querySelectorAll("time[data-relative]")) {
    const ahead = (new Date(time.dateTime) - Date.now()) / 1000;
    const text = Math.abs(ahead) < 5 ? "now" : ahead > 0 ? `in ${words(ahead)}` : `${words(-ahead)} ago`;
    if (time.textContent !== text) time.textContent = text;
  }
}

setInterval(keepTimes, 1000);
