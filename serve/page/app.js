// A picture and labels in, bars out. Whatever a person or the service wrote goes into the page as text, never as HTML.

const DEBOUNCE_MS = 150;
const PENDING_MS = 400; // an answer that takes longer dims the bars of the one before
const RETRY_MS = 2_000;
const ANNOUNCE_MS = 900; // calm before a screen reader is told
const SHORT_SIDE = 1024; // larger pictures are scaled down to it before they are sent
const MAX_CANVAS = 16_000_000; // pixels; iOS draws nothing above it
const MAX_UNREADABLE_BYTES = 20_000_000;
const SENT_AS_IT_IS = ["image/jpeg", "image/png", "image/webp", "image/gif"];
const ROWS = 20;

const EXAMPLES = {
  Animals: ["cat", "dog", "horse", "bird", "fish", "person"],
  Places: ["beach", "forest", "mountain", "city street", "kitchen", "office"],
  "Kinds of picture": ["photo", "drawing", "painting", "screenshot", "diagram", "page of text"],
  Characters: [
    "latin small letter e with acute",
    "latin small letter e",
    "black chess knight",
    "greek capital letter omega",
    "digit seven",
    "question mark",
  ],
};
const CHARACTERS = new Map([["é", "e-acute"], ["♞", "knight"], ["7", "seven"], ["Ω", "omega"]]);

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");

// ---------------------------------------------------------------------------------------------------------- the service

/** An answer that is not a 2xx, or none at all (status 0). */
class Refusal extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryMs = [0, 429, 503].includes(status) ? 1_000 * (Number(retryAfter) || 0) || RETRY_MS : null;
  }
}

const key = {
  value: "",
  read() {
    try {
      this.value = sessionStorage.getItem("rayclip.key") ?? "";
    } catch {
      // Storage may be switched off: the key then lasts until the page is left.
    }
  },
  write(value) {
    this.value = value;
    try {
      sessionStorage.setItem("rayclip.key", value);
    } catch {
      // As above.
    }
  },
};

/** The service's answer as an object. Throws Refusal, or AbortError where `signal` was aborted. */
async function call(path, { body, signal } = {}) {
  const headers = key.value ? { Authorization: `Bearer ${key.value}` } : {};
  const options = { signal, headers, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body });
  }
  let response, text;
  try {
    response = await fetch(path, options);
    text = await response.text();
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal("The service does not answer.");
  }
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // A proxy's page, say: told by its status below.
  }
  if (response.status === 401) askForKey();
  if (!response.ok || answer === null) {
    const message = answer?.error?.message ?? `The service answers with status ${response.status}.`;
    throw new Refusal(message, response.status, response.headers.get("Retry-After"));
  }
  return answer;
}

function askForKey() {
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

/** Say why there is no answer. Where a key is asked for and none was given, the field for it says so. */
function showRefusal(error) {
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401 && !key.value) return;
  showError(error.message);
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// --------------------------------------------------------------------------------------- models, templates, label sets

let models = [];
let templates = { default: [], data: {} };
let labelSets = [];

async function load() {
  const loaded = await Promise.allSettled([
    loadModels(),
    call("v1/templates").then(showTemplates),
    call("v1/label-sets").then((answer) => showLabelSets(answer.data)),
  ]);
  const failed = loaded.find((one) => one.status === "rejected");
  if (failed) showRefusal(failed.reason);
}

async function loadModels() {
  models = (await call("v1/models")).data;
  showModels();
}

let answeredBy = null;

function showModels() {
  const serving = models.filter((model) => model.share > 0);
  const items = models.map((model) => {
    const item = document.createElement("li");
    const said = [model.id];
    if (model.state !== "serving") said.push(model.state);
    else if (serving.length > 1) said.push(`${Math.round(100 * model.share)}%`);
    const text = document.createElement("span");
    text.textContent = said.join(" · ");
    item.append(text);
    item.title = model.error ?? (model.image_size ? `${model.id}, pictures of ${model.image_size} px` : model.id);
    item.dataset.state = model.state;
    item.classList.toggle("answered", model.id === answeredBy);
    return item;
  });
  $("models").replaceChildren(...items);
}

function option(text, value) {
  const element = document.createElement("option");
  element.textContent = text;
  element.value = value;
  return element;
}

const same = (one, other) => one.length === other.length && one.every((item, index) => item === other[index]);

function showTemplates(answer) {
  templates = answer;
  const names = Object.keys(templates.data);
  const fallback = names.find((name) => same(templates.data[name], templates.default));
  const options = names.map((name) => option(name, name));
  if (fallback === undefined) options.unshift(option("default", ""));
  const own = $("template").querySelector("[data-custom]");
  $("template").replaceChildren(...options, own);
  $("template").value = fallback ?? "";
  showTemplateHint();
}

const isCustom = () => $("template").selectedOptions[0].hasAttribute("data-custom");
const customTemplates = () => $("custom").value.split("\n").map((line) => line.trim()).filter(Boolean);

/** What the request says: a set's name, templates, or, before the service told its own, nothing. */
function chosenTemplates() {
  if (isCustom()) return customTemplates();
  return $("template").value || (templates.default.length ? templates.default : undefined);
}

function showTemplateHint() {
  $("custom-field").hidden = !isCustom();
  const shown = isCustom() ? [] : (templates.data[$("template").value] ?? templates.default);
  const more = shown.length > 1 ? `, and ${shown.length - 1} more` : "";
  $("template-hint").textContent = isCustom() ? "{} is where the label goes." : shown.length ? `“${shown[0]}”${more}` : "";
  $("template-hint").title = shown.join("\n");
}

function chooseTemplates(value) {
  const list = typeof value === "string" ? [value] : value;
  const name = typeof value === "string" && value in templates.data
    ? value
    : Object.keys(templates.data).find((one) => same(templates.data[one], list));
  if (name !== undefined) {
    $("template").value = name;
  } else {
    $("template").querySelector("[data-custom]").selected = true;
    $("custom").value = list.join("\n");
  }
  showTemplateHint();
}

function showLabelSets(sets) {
  labelSets = sets;
  $("set").replaceChildren(option("—", ""), ...sets.map((set) => option(`${set.name} (${set.labels.length})`, set.name)));
  $("sets").hidden = sets.length === 0;
}

/** The label set that was chosen and not edited since. */
const chosenSet = () => labelSets.find((set) => set.name === $("set").value);

// --------------------------------------------------------------------------------------------------------------- labels

const FIELD = /\s*(?:"([^"\n]+)"[^\S\n]*(?=[,\n]|$)|([^,\n]+))/g;

/** One a line or separated by commas; "in quotes" a label may hold a comma. Each is kept once. */
function parseLabels(text) {
  const found = [...text.matchAll(FIELD)].map((match) => (match[1] ?? match[2]).trim());
  return [...new Set(found.filter(Boolean))];
}

const formatLabels = (labels) => labels.map((label) => (label.includes(",") ? `"${label}"` : label)).join("\n");

function fillLabels(labels, setName = "") {
  $("labels").value = formatLabels(labels);
  $("set").value = setName;
  showAll = false;
  ask();
}

// -------------------------------------------------------------------------------------------------------------- picture

let picture = null; // {name, base64, url}: what is sent
let taking = 0;

/** Make this file the picture, and ask. */
async function take(file) {
  const mine = ++taking;
  running?.abort();
  $("bars").classList.add("stale");
  let next;
  try {
    const { blob, name, readable } = await prepare(file);
    next = { name, readable, base64: await toBase64(blob), url: URL.createObjectURL(blob) };
  } catch (error) {
    next = error;
  }
  if (mine !== taking) {
    if (next.url) URL.revokeObjectURL(next.url);
    return;
  }
  if (picture) URL.revokeObjectURL(picture.url);
  picture = next instanceof Error ? null : next;
  showPicture(file.name);
  ask();
  if (next instanceof Error) showRefusal(next);
  else if (!$("labels").value.trim() && matchMedia("(pointer: fine)").matches) $("labels").focus();
}

function showPicture(name) {
  const readable = picture?.readable ?? false;
  document.body.classList.toggle("has-picture", readable);
  $("preview").hidden = !readable;
  $("invite").hidden = readable;
  if (readable) {
    $("preview").src = picture.url;
    $("preview").alt = `The chosen picture, ${name}. Choose another`;
    $("picture-hint").textContent = "";
  } else {
    $("preview").removeAttribute("src");
    $("invite-title").textContent = "Choose another picture";
    $("picture-hint").textContent = `${name} cannot be shown`;
  }
}

/** The picture as it will be sent. A file that the browser cannot read stays as it is: the service may know it. */
async function prepare(file) {
  const name = file.name || "picture";
  const image = new Image();
  const url = URL.createObjectURL(file);
  try {
    image.src = url;
    await image.decode();
    const size = [image.naturalWidth || SHORT_SIDE, image.naturalHeight || SHORT_SIDE];
    const small = Math.min(...size) <= SHORT_SIDE;
    if (small && SENT_AS_IT_IS.includes(file.type) && !(await isTurned(file))) return { blob: file, name, readable: true };
    const blob = await redraw(image, ...size);
    return { blob, name: `${name.replace(/\.[^.]*$/, "")}.jpg`, readable: true };
  } catch {
    if (file.size > MAX_UNREADABLE_BYTES) throw new Refusal(`${name} is no picture that this browser can read.`, 400);
    return { blob: file, name, readable: false };
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** A JPEG with the shorter side at most SHORT_SIDE, turned as its EXIF says, on white. */
async function redraw(image, width, height) {
  const scale = Math.min(1, SHORT_SIDE / Math.min(width, height));
  // In halves: one big step would skip pixels where a browser's smoothing reads only the nearest few.
  let steps = Math.max(0, Math.floor(Math.log2(1 / scale)));
  while (steps > 0 && width * height * (scale * 2 ** steps) ** 2 > MAX_CANVAS) steps--;
  let source = image;
  for (; steps >= 0; steps--) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * scale * 2 ** steps));
    canvas.height = Math.max(1, Math.round(height * scale * 2 ** steps));
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, canvas.width, canvas.height);
    source = canvas;
  }
  return await toBlob(source, "image/jpeg", 0.92);
}

function toBlob(canvas, type, quality) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the canvas is empty"))), type, quality);
  });
}

/** Whether a JPEG's EXIF turns or mirrors it: browsers obey that, a program that reads the pixels may not. */
async function isTurned(file) {
  const view = new DataView(await file.slice(0, 1 << 17).arrayBuffer());
  try {
    if (view.getUint16(0) !== 0xffd8) return false;
    for (let at = 2; view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; at += 2 + view.getUint16(at + 2)) {
      if (view.getUint16(at) !== 0xffe1 || view.getUint32(at + 4) !== 0x45786966) continue; // APP1 with "Exif"
      const tiff = at + 10;
      const little = view.getUint16(tiff) === 0x4949;
      const directory = tiff + view.getUint32(tiff + 4, little);
      for (let entry = directory + 2, left = view.getUint16(directory, little); left > 0; left--, entry += 12) {
        if (view.getUint16(entry, little) === 0x0112) return view.getUint16(entry + 8, little) > 1;
      }
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // a cut header turns nothing
  }
  return false;
}

function toBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refusal("The file cannot be read.", 400));
    reader.readAsDataURL(blob);
  });
}

/** A character as a picture: black on white. */
async function draw(character) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 256;
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, 256, 256);
  context.fillStyle = "#000";
  context.font = "190px Georgia, 'DejaVu Serif', serif";
  const box = context.measureText(character);
  const x = 128 + (box.actualBoundingBoxLeft - box.actualBoundingBoxRight) / 2;
  const y = 128 + (box.actualBoundingBoxAscent - box.actualBoundingBoxDescent) / 2;
  context.fillText(character, x, y);
  const blob = await toBlob(canvas, "image/png");
  return new File([blob], `${CHARACTERS.get(character)}.png`, { type: "image/png" });
}

// --------------------------------------------------------------------------------------------------------------- asking

let timer = 0; // of the debounce, or of the next try
let running = null; // AbortController of the newest request
let showAll = false;

/** The request's body without the picture, or null where something is missing. */
function question() {
  const set = chosenSet();
  const labels = set?.labels ?? parseLabels($("labels").value);
  $("count").textContent = labels.length ? `${labels.length.toLocaleString("en")} ${labels.length > 1 ? "labels" : "label"}` : "";
  if (!picture || !labels.length) return null;
  const scores = document.querySelector("[name=scores]:checked").value;
  const body = { ...(set ? { label_set: set.name } : { labels }), templates: chosenTemplates(), scores };
  if (!showAll && labels.length > ROWS) body.top_k = ROWS;
  return { body, count: labels.length };
}

function askSoon() {
  clearTimeout(timer);
  timer = setTimeout(ask, DEBOUNCE_MS);
}

/** Send what is chosen now and show the answer. The request before is aborted, its answer never shown. */
async function ask() {
  clearTimeout(timer);
  running?.abort();
  const mine = (running = new AbortController());
  const asked = question();
  showCommand(asked?.body);
  if (!asked) return showNothing();
  $("empty").hidden = true;
  const dim = setTimeout(() => $("bars").classList.add("stale"), PENDING_MS);
  const began = performance.now();
  try {
    const body = JSON.stringify({ image: picture.base64, ...asked.body });
    const answer = await call("v1/zero-shot", { body, signal: mine.signal });
    const elapsed = performance.now() - began;
    if (mine.signal.aborted) return;
    const [result] = answer.results;
    if (result.error) throw new Refusal(result.error.message, 400);
    showAnswer(answer, result.predictions, asked.count, elapsed);
  } catch (error) {
    if (mine.signal.aborted) return;
    if (error.retryMs) timer = setTimeout(ask, error.retryMs);
    else clearAnswer();
    showRefusal(error);
  } finally {
    clearTimeout(dim);
  }
}

// ------------------------------------------------------------------------------------------------------------ answering

function showNothing() {
  clearAnswer();
  showError("");
  $("empty").hidden = false;
  $("empty").textContent = picture
    ? "Now type a label or two."
    : $("count").textContent
      ? "Now choose a picture."
      : "With a picture and a few labels, bars here show which labels fit.";
}

function clearAnswer() {
  $("bars").replaceChildren();
  $("more").hidden = $("advice").hidden = $("meta").hidden = true;
  announce("");
}

function showAnswer(answer, predictions, count, elapsed) {
  showError("");
  showBars(predictions, answer.scores);
  $("more").hidden = predictions.length >= count;
  $("more").textContent = `Show all ${count.toLocaleString("en")}`;
  $("advice").hidden = count > 1 || answer.scores !== "softmax";
  $("advice").textContent = "A label alone is always 100%. Add another to compare it with.";
  $("meta").hidden = false;
  $("model").textContent = `Answered by ${answer.model}`;
  $("latency").textContent = `in ${Math.max(1, Math.round(elapsed))} ms`;
  $("latency").title = "From sending to the whole answer, measured in this browser";
  announce(predictions.slice(0, 3).map((one) => `${one.label} ${percent(one.score)}`).join(", "));
  const known = models.some((model) => model.id === answer.model);
  answeredBy = answer.model;
  showModels();
  if (!known) loadModels().catch(showRefusal);
}

function percent(score) {
  const value = 100 * score;
  if (value >= 0.1 || value === 0) return `${value.toFixed(1)}%`;
  return value < 0.01 ? "<0.01%" : `${value.toFixed(2)}%`;
}

function makeRow() {
  const row = document.createElement("li");
  for (const name of ["fill", "label", "score"]) {
    const part = document.createElement("span");
    part.className = name;
    row.append(part);
  }
  return row;
}

const MOTION = { duration: 350, easing: "cubic-bezier(0.2, 0.8, 0.2, 1)" };

/** The rows in the answer's order. A label keeps its row, and a row whose label went is given to a new one. */
function showBars(predictions, scores) {
  const list = $("bars");
  const moves = !still.matches && predictions.length <= 3 * ROWS;
  const before = new Map();
  for (const row of moves ? list.children : []) {
    before.set(row, { top: row.getBoundingClientRect().top, fill: getComputedStyle(row.firstChild).transform });
  }
  const free = new Map([...list.children].map((row) => [row.dataset.label, row]));
  const kept = predictions.map(({ label }) => {
    const row = free.get(label);
    free.delete(label);
    return row;
  });
  const spare = [...free.values()];
  const rows = predictions.map(({ label, score }, place) => {
    const row = kept[place] ?? spare.shift() ?? makeRow();
    const [fill, name, value] = row.children;
    row.dataset.label = label;
    name.textContent = label;
    value.textContent = percent(score);
    fill.style.transform = `translateX(${100 * (Math.min(1, Math.max(0, score)) - 1)}%)`;
    row.classList.toggle("best", scores === "softmax" ? place === 0 : score >= 0.5);
    return row;
  });
  list.replaceChildren(...rows);
  list.classList.remove("stale");
  if (moves) for (const row of rows) moveRow(row, before.get(row));
}

/** From where the row and its bar were, to where they are; a new one fades in and grows. */
function moveRow(row, before) {
  const fall = before ? before.top - row.getBoundingClientRect().top : 0;
  if (!before) row.animate([{ opacity: 0 }, {}], MOTION);
  else if (fall) row.animate([{ transform: `translateY(${fall}px)` }, {}], MOTION);
  row.firstChild.animate([{ transform: before?.fill ?? "translateX(-100%)" }, {}], MOTION);
}

let announcing = 0;

/** Tell a screen reader, once typing has paused. */
function announce(text) {
  clearTimeout(announcing);
  announcing = setTimeout(() => ($("summary").textContent = text), ANNOUNCE_MS);
}

// ----------------------------------------------------------------------------------------------------------------- curl

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The present request as a command: the picture comes from a file, for it is too long for an argument. */
function showCommand(body) {
  $("command").hidden = !body;
  if (!body) return;
  $("save").href = picture.url;
  $("save").download = picture.name;
  const rest = `", ${JSON.stringify(body).slice(1)}`;
  const lines = [
    `{ printf %s '{"image": "'`,
    `  base64 < ${quote(picture.name)} | tr -d '\\n'`,
    `  printf %s ${quote(rest)}`,
    `} | curl -sS ${quote(new URL("v1/zero-shot", document.baseURI).href)} --data-binary @- \\`,
    `  -H 'Content-Type: application/json'`,
  ];
  if (key.value) lines.push(`  -H "Authorization: Bearer $RAYCLIP_KEY"`);
  if (key.value) lines[4] += " \\";
  $("curl").textContent = lines.join("\n");
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 1_500);
  } catch {
    getSelection().selectAllChildren($("curl")); // the clipboard is closed to pages that came over plain HTTP
  }
}

// --------------------------------------------------------------------------------------------------------------- events

function button(text, press) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", press);
  return element;
}

for (const [name, labels] of Object.entries(EXAMPLES)) $("examples").append(button(name, () => fillLabels(labels)));
for (const [character, name] of CHARACTERS) {
  const press = async () => {
    if (!$("labels").value.trim()) fillLabels(EXAMPLES.Characters);
    await take(await draw(character));
  };
  const element = button(character, press);
  element.setAttribute("aria-label", `Draw ${character} (${name}) as a picture`);
  $("characters").append(element);
}

for (const id of ["file", "camera"]) {
  $(id).addEventListener("change", () => {
    const [file] = $(id).files;
    if (file) take(file);
    $(id).value = ""; // the same file can be chosen again
  });
}

const isField = (target) => target instanceof Element && target.matches("textarea, input");
const holdsFiles = (event) => event.dataTransfer.types.includes("Files");

document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!file || (isField(event.target) && event.clipboardData.getData("text/plain"))) return;
  event.preventDefault();
  take(file);
});
document.addEventListener("dragover", (event) => {
  if (isField(event.target) && !holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (isField(event.target) && !holdsFiles(event)) return;
  event.preventDefault();
  const files = [...event.dataTransfer.files];
  if (files.length) take(files.find((one) => one.type.startsWith("image/")) ?? files[0]);
  else showError("That was an address or a text. Copy the picture itself and paste it, or drop its file.");
});

$("labels").addEventListener("input", () => {
  $("set").value = "";
  showAll = false;
  askSoon();
});
$("set").addEventListener("change", () => {
  const set = chosenSet();
  if (!set) return ask();
  if (set.templates) chooseTemplates(set.templates);
  fillLabels(set.labels, set.name);
});
$("template").addEventListener("change", () => {
  showTemplateHint();
  if (isCustom()) $("custom").focus();
  ask();
});
$("custom").addEventListener("input", askSoon);
for (const radio of document.querySelectorAll("[name=scores]")) radio.addEventListener("change", ask);
$("more").addEventListener("click", () => {
  showAll = true;
  ask();
});
$("copy").addEventListener("click", copyCommand);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) return showError("An API key holds neither spaces nor letters beyond ASCII.");
  key.write(value);
  $("key-form").hidden = true;
  showError("");
  load();
  ask();
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") loadModels().catch(showRefusal);
});

key.read();
load();
ask();
