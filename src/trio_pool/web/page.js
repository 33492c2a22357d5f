// Puts what the server renders in its place, and says when nothing comes any more.
"use strict";

const QUIET = 4_000; // Milliseconds without a picture until it counts as lost.
const HOPELESS = 10_000; // Milliseconds until a silent connection is given up.
const LONGEST = 5_000; // Milliseconds between two attempts at most.
const ASLEEP = 60_000; // Milliseconds that a page out of sight stays connected.

const byId = (id) => document.getElementById(id);

// What is not shown yet as somebody is selecting text in its place.
const held = new Map();

let source = null;
let heard = Date.now();
let failed = false;
let attempts = 0;
let retry = 0;
let sleep = 0;

function selecting(place) {
  const selection = document.getSelection();
  return (
    selection !== null &&
    !selection.isCollapsed &&
    selection.rangeCount > 0 &&
    selection.getRangeAt(0).intersectsNode(place)
  );
}

function show(fragments) {
  for (const [id, html] of Object.entries(fragments)) {
    const place = byId(id);
    if (place === null) continue;
    if (selecting(place)) {
      held.set(id, html);
      continue;
    }
    held.delete(id);
    if (place.innerHTML !== html) place.innerHTML = html;
    if (id === "page-icon") byId("icon").href = place.textContent;
  }
}

function say(state, text) {
  document.body.classList.toggle("live", state === "live");
  document.body.classList.toggle("lost", state === "lost");
  const link = byId("link");
  if (link.textContent !== text) link.textContent = text;
}

function lose(why) {
  say("lost", `${why}, last picture of ${byId("clock").textContent}`);
}

function disconnect() {
  clearTimeout(retry);
  retry = 0;
  if (source !== null) source.close();
  source = null;
}

function connect() {
  disconnect();
  heard = Date.now();
  const opened = new EventSource("events");
  source = opened;
  opened.onmessage = (event) => {
    heard = Date.now();
    failed = false;
    attempts = 0;
    show(JSON.parse(event.data));
    say("live", "live");
  };
  opened.onerror = () => {
    failed = true;
    lose("connection lost");
    // A browser tries again by itself, but not after an answer such as 503.
    if (source === opened && opened.readyState === EventSource.CLOSED) again();
  };
}

function again() {
  disconnect();
  const pause = Math.min(LONGEST, 250 * 2 ** attempts);
  attempts += 1;
  retry = setTimeout(connect, pause * (0.5 + Math.random() / 2));
}

function watch() {
  if (source === null) return;
  const silence = Date.now() - heard;
  if (silence > HOPELESS) {
    again();
  } else if (silence > QUIET) {
    lose(failed ? "connection lost" : "no news: is the program blocked?");
  }
}

// A browser has only six connections to a server: tabs that nobody sees give
// theirs back, and say so.
function rest() {
  disconnect();
  lose("asleep");
  document.title = `(asleep) ${document.title}`;
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(sleep);
  if (document.hidden) sleep = setTimeout(rest, ASLEEP);
  else if (source === null) connect();
});

addEventListener("pagehide", disconnect);

addEventListener("pageshow", (event) => {
  if (event.persisted) connect();
});

document.addEventListener("selectionchange", () => {
  if (held.size > 0) show(Object.fromEntries(held));
});

async function read(response) {
  try {
    return await response.json();
  } catch {
    return {}; // A proxy answers in its own words.
  }
}

function inWords(response, answer) {
  if (!response.ok) return `refused: ${answer.error ?? response.status}`;
  if (answer.size === undefined) return answer.state ?? "done";
  return `${answer.size} wanted, ${answer.workers_up} up`;
}

async function act(form, name, body) {
  const answer = form.querySelector("output");
  const tell = (text, refused) => {
    answer.textContent = text;
    answer.classList.toggle("refused", refused);
  };
  tell(`${name} ...`, false);
  try {
    const response = await fetch(`pools/${form.dataset.pool}/${name}`, {
      method: "POST",
      headers: {
        Authorization: `Bearer ${byId("token").value}`,
        "Content-Type": "application/json",
      },
      body: JSON.stringify(body),
    });
    const words = inWords(response, await read(response));
    tell(`${name}: ${words}`, !response.ok);
  } catch (error) {
    tell(`${name}: no answer (${error.message})`, true);
  }
}

for (const form of document.querySelectorAll("form.controls")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    act(form, "resize", { size: form.elements.size.valueAsNumber });
  });
  for (const button of form.querySelectorAll("button[type=button]")) {
    button.addEventListener("click", () => act(form, button.dataset.act, {}));
  }
}

for (const form of document.querySelectorAll("form.token")) {
  form.addEventListener("submit", (event) => event.preventDefault());
}

setInterval(watch, 1_000);
connect();
