"use strict";
// The page keeps passages, question and answers in memory only; the address holds settings, never what was typed.

const RATIOS = [1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16];
const $ = (id) => document.getElementById(id);
let ways = [], examples = [], results = new Map(), asked = [], running = null;

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function passagesOf(text) {
  return text.split(/\n\s*\n/).map((part) => part.trim()).filter(Boolean);
}

// -- settings ---------------------------------------------------------------------------------------------------------

function addWay(way) {
  const row = $("way").content.firstElementChild.cloneNode(true);
  const [box, slider] = row.querySelectorAll("input");
  const shown = row.querySelector("output");
  box.checked = way.chosen;
  row.querySelector(".title").textContent = way.title;
  row.querySelector(".badge").textContent = { kv: "keys and values", embeds: "soft tokens", text: "shorter text" }[way.interface] || "";
  if (way.ratio === null) {
    slider.remove();
    shown.remove();
  } else {
    const show = () => {
      shown.value = `${RATIOS[slider.value]}×`;
      slider.setAttribute("aria-valuetext", `${RATIOS[slider.value]} times shorter`);
    };
    slider.setAttribute("aria-label", `How many times shorter: ${way.title}`);
    way.setRatio = (ratio) => {
      slider.value = RATIOS.indexOf(RATIOS.reduce((a, b) => (Math.abs(b - ratio) < Math.abs(a - ratio) ? b : a)));
      show();
    };
    way.setRatio(way.ratio);
    slider.addEventListener("input", show);
    slider.addEventListener("change", saveSettings);
    way.getRatio = () => RATIOS[slider.value];
  }
  box.addEventListener("change", saveSettings);
  Object.assign(way, { box });
  $("ways").append(row);
}

function saveSettings() {
  const chosen = ways.filter((way) => way.box.checked);
  const words = chosen.map((way) => way.name + (way.getRatio ? `@${way.getRatio()}` : ""));
  const settings = new URLSearchParams({ ways: words.join(";") });
  if ($("example").value !== "") settings.set("example", $("example").value);
  history.replaceState(null, "", `#${settings}`);
}

function loadSettings() {
  const settings = new URLSearchParams(location.hash.slice(1));
  if (settings.has("ways")) {
    const wanted = new Map(settings.get("ways").split(";").map((word) => word.split("@")));
    for (const way of ways) {
      way.box.checked = wanted.has(way.name);
      const ratio = Number(wanted.get(way.name));
      if (way.setRatio && ratio >= 1) way.setRatio(ratio);
    }
  }
  const number = settings.has("example") ? Number(settings.get("example")) : 0;
  if (examples[number]) showExample(number);
}

function showExample(number) {
  $("example").value = String(number);
  $("passages").value = examples[number].passages.join("\n\n");
  $("question").value = examples[number].question;
}

async function share() {
  saveSettings();
  try {
    await navigator.clipboard.writeText(location.href);
    say("Copied. The link holds the methods and ratios, not your passages.");
  } catch {
    say("Copy the address of this page: it holds the methods and ratios, not your passages.");
  }
}

function say(text) {
  $("status").textContent = text;
}

// -- asking -----------------------------------------------------------------------------------------------------------

async function ask() {
  const passages = passagesOf($("passages").value);
  const chosen = ways.filter((way) => way.box.checked);
  if (!passages.length || !$("question").value.trim()) return say("Give a passage and a question.");
  if (!chosen.length) return say("Choose at least one way to read.");
  running?.abort();
  const mine = (running = new AbortController());
  asked = passages;
  results = new Map();
  $("answers").replaceChildren();
  $("results").hidden = false;
  $("stop").disabled = false;
  let done = 0;
  say(`Reading in ${chosen.length} ways, one after another ...`);
  const work = chosen.map((way) => {
    const card = $("card").content.firstElementChild.cloneNode(true);
    const ratio = way.getRatio ? way.getRatio() : null;
    const result = { way, title: way.title + (ratio ? `, ${ratio}×` : ""), text: "" };
    results.set(way.name, result);
    card.querySelector("h3").textContent = result.title;
    $("answers").append(card);
    return one(result, card, passages, ratio, mine.signal).then(() => {
      if (mine.signal.aborted) return;
      done += 1;
      say(`${done} of ${chosen.length} answered.`);
    });
  });
  render();
  await Promise.all(work);
  if (running === mine) {
    $("stop").disabled = true;
    if (mine.signal.aborted) say(`Stopped; ${done} of ${chosen.length} answered.`);
  }
}

async function one(result, card, passages, ratio, signal) {
  const answer = card.querySelector(".answer");
  try {
    const body = JSON.stringify({ question: $("question").value, passages, way: result.way.name, ratio });
    const headers = { "Content-Type": "application/json" };
    const reply = await fetch("/api/ask", { method: "POST", headers, body, signal });
    if (!reply.ok) throw new Error((await reply.json()).error);
    for await (const event of events(reply.body)) {
      if (event.event === "error") throw new Error(event.text);
      if (event.event === "piece") answer.textContent = (result.text += event.text).trim();
      else Object.assign(result, event);
      if (event.event === "context") card.querySelector(".facts").textContent = facts(result);
      if (event.event !== "piece") render();
    }
    if (result.ttft_ms === undefined) throw new Error("The answer was cut off.");
    if (!result.text.trim()) answer.textContent = "(nothing)";
  } catch (error) {
    result.failed = true;
    answer.textContent = signal.aborted ? `${result.text} (stopped)` : error.message;
    if (!signal.aborted) answer.classList.add("failed");
  }
  answer.setAttribute("aria-busy", "false");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice("data: ".length));
  }
}

function facts(result) {
  if (!result.way.interface) return "";
  const made = result.compress_ms === null ? "compressed before" : `compressed in ${time(result.compress_ms)}`;
  return `${result.ratio.toFixed(1)} times shorter, ${made}`;
}

// -- costs and what was kept ------------------------------------------------------------------------------------------

const whole = (number) => Math.round(number).toLocaleString("en");
const time = (ms) => (ms < 1000 ? `${whole(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const bytes = (n) => (n < 1024 ? `${n} B` : n < 2 ** 20 ? `${(n / 1024).toFixed(1)} KiB` : `${(n / 2 ** 20).toFixed(1)} MiB`);
const COSTS = [
  ["Tokens the reader computes", "read", whole],
  ["Bytes of the context", "bytes", bytes],
  ["Time to first token", "ttft_ms", time],
];

function render() {
  $("costs").replaceChildren(...COSTS.map(([title, name, format]) => {
    const table = element("table");
    table.append(element("caption", title));
    const most = Math.max(...[...results.values()].map((result) => result[name] ?? 0), 1e-9);
    for (const result of results.values()) {
      const row = table.insertRow();
      const head = element("th", result.title);
      head.scope = "row";
      const bar = element("div", "", "bar");
      if (result[name] !== undefined) {
        const drawn = element("span");
        drawn.style.setProperty("--share", result[name] / most);
        bar.append(drawn, format(result[name]));
      }
      row.append(head);
      row.insertCell().append(bar);
    }
    return table;
  }));
  const mapped = [...results.values()].filter((result) => result.kept?.some(Boolean));
  const before = $("map-way").value;
  $("map-way").replaceChildren(...mapped.map((result) => new Option(result.title, result.way.name)));
  if (mapped.some((result) => result.way.name === before)) $("map-way").value = before;
  $("map-way").disabled = !mapped.length;
  drawMap();
}

function marked(text, share) {
  const mark = element("mark", text);
  mark.style.setProperty("--share", Math.sqrt(share)); // small shares can be told apart
  return mark;
}

function drawMap() {
  const result = results.get($("map-way").value);
  $("map").replaceChildren();
  if (!result) {
    $("map-legend").textContent = "Soft tokens stand for no single words: choose a method that keeps words, or keys and values.";
    return;
  }
  const heads = result.way.interface === "kv";
  $("map-legend").replaceChildren(
    heads ? "Share of the reader's heads that keep a token's keys and values: " : "Struck out: left out. Marked: kept.",
    ...(heads ? [0, 0.25, 0.5, 0.75, 1].map((share) => marked(`\u00a0${100 * share} %\u00a0`, share)) : []),
  );
  asked.forEach((text, number) => {
    const shown = element("p");
    const characters = Array.from(text); // the server counts code points
    let at = 0;
    const plain = (end) => {
      if (end > at) shown.append(element("span", characters.slice(at, end).join(""), heads ? "" : "dropped"));
      at = Math.max(at, end);
    };
    for (const [start, end, share] of result.kept[number] ?? []) {
      plain(start);
      if (end <= at) continue;
      const mark = marked(characters.slice(at, end).join(""), heads ? share : 0.25);
      if (heads) mark.title = `kept by ${Math.round(100 * share)} % of the heads`;
      shown.append(mark);
      at = end;
    }
    plain(characters.length);
    $("map").append(shown);
  });
}

// -- start ------------------------------------------------------------------------------------------------------------

async function start() {
  try {
    const setup = await (await fetch("/api/setup")).json();
    ({ ways, examples } = setup);
    $("reader").textContent = setup.reader;
  } catch {
    return say("The server does not answer: is nutgraf play still running?");
  }
  ways.forEach(addWay);
  examples.forEach((example, number) => $("example").append(new Option(`${example.title}: ${example.question}`, number)));
  loadSettings();
  $("example").addEventListener("change", () => {
    if ($("example").value !== "") showExample(Number($("example").value));
    saveSettings();
  });
  for (const id of ["passages", "question"]) {
    $(id).addEventListener("input", () => {
      $("example").value = "";
      saveSettings();
    });
  }
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("share").addEventListener("click", share);
  $("map-way").addEventListener("change", drawMap);
}

start();
