// Optional. Counts down, notices that a grant changed (then no button of the old page works any more),
// keeps the queue fresh, and keeps Enter from approving. Without it everything else works.
"use strict";
(() => {
  const POLL_MS = 4000;
  const status = document.getElementById("status");
  let main = document.getElementById("main");

  function span(secs) {
    const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
    let i = units.findIndex(([size]) => secs >= size);
    if (i < 0) i = 3;
    const [size, unit] = units[i];
    const next = units[i + 1];
    const rest = next ? Math.floor((secs % size) / next[0]) : 0;
    const head = `${Math.floor(secs / size)} ${unit}`;
    return rest > 0 && (next[0] > 1 || secs < 600) ? `${head} ${rest} ${next[1]}` : head;
  }

  // The broker's clock counts, not this machine's: only the time since the page came is measured here.
  let came = performance.now();
  function tick() {
    const gone = performance.now() - came;
    for (const el of document.querySelectorAll("[data-until]")) {
      const ms = Number(el.dataset.until) - Number(el.dataset.now) - gone;
      el.textContent = span(Math.max(0, Math.floor(ms / 1000)));
    }
  }
  setInterval(tick, 1000);

  function say(text, link) {
    status.textContent = text + " ";
    if (link) {
      const a = document.createElement("a");
      a.href = location.pathname;
      a.textContent = link;
      status.append(a);
    }
  }

  const busy = () => main.contains(document.activeElement) || main.querySelector("details[open]") ||
    [...main.querySelectorAll("input:not([type=hidden]),textarea")].some((f) => f.value !== f.defaultValue);

  async function renew() {
    const answer = await fetch(location.pathname, { credentials: "same-origin", redirect: "error" });
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const next = fresh.getElementById("main");
    if (!next || busy()) return;
    const heading = main.querySelector("h1").textContent;
    main.replaceWith(next);
    main = next;
    came = performance.now();
    document.title = fresh.title;
    if (main.querySelector("h1").textContent !== heading) say(main.querySelector("h1").textContent);
  }

  let frozen = false;
  function freeze(now) {
    frozen = true;
    for (const b of main.querySelectorAll("form:not([data-keep]) button")) b.disabled = true;
    say(`${now.by ? now.by + " changed this" : "This changed"} while the page was open: it is ${now.state} now.`, "Show it");
  }

  async function poll() {
    const { poll: address, version, state } = main.dataset;
    const answer = await fetch(address, { credentials: "same-origin", redirect: "error" });
    if (!answer.ok) return;
    const now = await answer.json();
    if (String(now.version) === version) return;
    if (state === "pending") freeze(now);
    else if (busy()) say("There is news.", "Show it");
    else await renew();
  }

  async function round() {
    const wait = main.dataset.refresh ? Number(main.dataset.refresh) * 1000 : POLL_MS;
    try {
      if (!document.hidden && !frozen) {
        if (main.dataset.poll) await poll();
        else if (main.dataset.refresh && !busy()) await renew();
      }
    } catch { /* The broker can't be reached just now: the page stays as it is, votes carry the digest. */ }
    setTimeout(round, wait);
  }
  if (main && (main.dataset.poll || main.dataset.refresh)) setTimeout(round, POLL_MS);

  // A page from the back button's cache is old news.
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

  for (const button of document.querySelectorAll("[data-approve]")) {
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      say("Enter never approves. Use the space bar or a click.");
    });
    const label = button.textContent;
    let left = Number(button.dataset.pause || 0);
    const pause = () => {
      if (frozen) return;
      button.disabled = left > 0;
      button.textContent = left > 0 ? `${label} (in ${left} s)` : label;
      if (left-- > 0) setTimeout(pause, 1000);
    };
    if (left > 0) pause();
    button.form.addEventListener("submit", (event) => {
      if (frozen || button.dataset.sent) event.preventDefault();
      button.dataset.sent = "yes";
    });
  }
})();
