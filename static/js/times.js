// Keeps <time data-relative> and <time data-since> current. The server wrote the same words of the
// first when it made the page; the second is how long something has gone on, by the server's clock.
const UNITS = [[86400, "d"], [3600, "h"], [60, "min"]];
const madeAt = Number(document.querySelector("[data-now]")?.dataset.now);
// A clock that is off by less than the page took to get here is right.
const ahead = madeAt && Math.abs(Date.now() / 1000 - madeAt) > 10 ? Date.now() / 1000 - madeAt : 0;

function words(seconds) {
  const unit = UNITS.find(([length]) => seconds >= length);
  return unit ? `${Math.floor(seconds / unit[0])}\u202f${unit[1]}` : `${Math.floor(seconds)}\u202fs`;
}

// As the server's `duration`, in whole seconds: it ticks.
function length(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)}\u202fs`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}\u202fmin ${Math.floor(seconds % 60)}\u202fs`;
  return `${Math.floor(seconds / 3600)}\u202fh ${Math.floor((seconds % 3600) / 60)}\u202fmin`;
}

function write(time, text) {
  if (time.textContent !== text) time.textContent = text;
}

export function keepTimes() {
  for (const time of document.querySelectorAll("time[data-relative]")) {
    const away = (new Date(time.dateTime) - Date.now()) / 1000;
    write(time, Math.abs(away) < 5 ? "now" : away > 0 ? `in ${words(away)}` : `${words(-away)} ago`);
  }
  for (const time of document.querySelectorAll("time[data-since]")) {
    write(time, length(Math.max(Date.now() / 1000 - ahead - new Date(time.dataset.since) / 1000, 0)));
  }
}

setInterval(keepTimes, 1000);
