"use strict";

// Draws what /events sends. Whatever comes from there is text: it goes into textContent, a title or an encoded path,
// never into HTML. Times are durations from the moment a message arrives, so nobody's clock has to be right. The first
// state is in the page itself, so that nothing moves when it is drawn.

const SVG = "http://www.w3.org/2000/svg";
const RADIUS = 190;
const byId = (id) => document.getElementById(id);

let state = null;
let arrived = 0;
let away = false;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Whether that was not drawn there last. What did not change stays: whoever reads, selects or clicks it would lose it.
const drawn = new WeakMap();
function isNew(element, ...value) {
  const text = JSON.stringify(value);
  if (drawn.get(element) === text) return false;
  drawn.set(element, text);
  return true;
}

function draw(tag, attributes, title) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (title) element.appendChild(document.createElementNS(SVG, "title")).textContent = title;
  return element;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

function duration(seconds) {
  const whole = Math.max(0, Math.ceil(seconds));
  const [days, hours, minutes, rest] =
    [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

// -- records ---------------------------------------------------------------------------------------------------------

const cards = new Map();

function card(key) {
  if (!cards.has(key)) {
    const element = byId("record").content.firstElementChild.cloneNode(true);
    element.querySelector("h3").textContent = key;
    cards.set(key, element);
  }
  return cards.get(key);
}

function link(key, name) {
  const element = make("a", "", name);
  element.href = [...key.split("/"), name].map(encodeURIComponent).join("/");
  return element;
}

function drawHolders(element, holders) {
  element.hidden = !holders.length;
  if (isNew(element, holders)) {
    element.querySelector(".addresses").replaceChildren(...holders.map((address) => make("li", "", address)));
  }
}

function drawFiles(element, record) {
  if (!isNew(element, record.files, record.more_files)) return;
  const rows = record.files.map((file) => {
    const row = make("li");
    row.append(link(record.key, file.name), make("span", "", size(file.size)));
    return row;
  });
  const boots = record.files.some((file) => file.role === "kernel");
  for (const name of boots ? ["boot.ipxe", "manifest.json"] : ["manifest.json"]) {
    if (record.files.some((file) => file.name === name)) continue;
    const row = make("li");
    row.append(link(record.key, name), make("span", "", name === "boot.ipxe" ? "for iPXE" : "signed"));
    rows.unshift(row);
  }
  if (record.more_files) rows.push(make("li", "", `and ${record.more_files} more`));
  element.querySelector(".files").replaceChildren(...rows);
  const total = record.files.reduce((sum, file) => sum + file.size, 0);
  const count = record.files.length + record.more_files;
  element.querySelector(".count").textContent =
    `${count} file${count === 1 ? "" : "s"}` + (record.more_files ? "" : `, ${size(total)}`);
}

function drawRecord(record) {
  const element = card(record.key);
  element.querySelector(".version").textContent = record.version;
  const advertised = record.seq !== undefined;
  element.querySelector(".seq").textContent = advertised ? record.seq : "not advertised yet";
  element.querySelector(".holders").textContent = advertised ? record.holders : "-";
  drawHolders(element.querySelector(".held"), record.held_by);
  element.querySelector(".timers").hidden = !advertised;
  drawFiles(element, record);
  return element;
}

function timer(element, left, whole, over) {
  const text = element.querySelector(".left");
  text.textContent = left === null || left <= 0 ? over : duration(left);
  text.classList.toggle("late", left === null || left <= 0);
  element.querySelector("progress").value = whole > 0 ? Math.min(1, Math.max(0, (left || 0) / whole)) : 0;
}

function tick() {
  if (!state || away) return;
  const passed = (performance.now() - arrived) / 1000;
  for (const record of state.records) {
    if (record.seq === undefined) continue;
    const element = card(record.key);
    const refresh = record.refresh_in === null ? null : record.refresh_in - passed;
    timer(element.querySelector(".refresh"), refresh, state.refresh_interval, "now");
    timer(element.querySelector(".expiry"), record.ttl_remaining - passed, state.record_ttl, "expired");
  }
}

// -- routing table ---------------------------------------------------------------------------------------------------

function drawSky(table, holders) {
  if (!isNew(byId("sky"), table, [...holders])) return;
  const deepest = Math.max(3, ...table.contacts.map((contact) => contact.shared));
  const radius = (shared) => RADIUS * (1 - shared / (deepest + 1.2));
  const svg = draw("svg", { viewBox: "-205 -205 410 410", role: "img" }, `The routing table: ${table.live} contacts`);
  for (let shared = 0; shared <= deepest; shared += 1) svg.append(draw("circle", { class: "ring", r: radius(shared) }));
  // Each ring starts a little farther round, so that a contact at the start of one does not hide the next.
  const place = (contact) => {
    const angle = 2 * Math.PI * (contact.around + contact.shared * 0.381966) - Math.PI / 2;
    return [Math.cos(angle) * radius(contact.shared), Math.sin(angle) * radius(contact.shared)];
  };
  for (const contact of [...table.contacts].reverse()) {
    const [x, y] = place(contact);
    const kind = contact.stale ? "stale" : holders.has(contact.address) ? "holder" : "live";
    const said = `${contact.address}\n${contact.id}…\n${contact.shared} bits shared`;
    svg.append(draw("circle", { class: `contact ${kind}`, cx: x.toFixed(1), cy: y.toFixed(1), r: 5 }, said));
  }
  svg.append(draw("circle", { class: "self", r: 7 }, `this node\n${table.id}`));
  byId("sky").replaceChildren(svg);
  byId("sky").hidden = byId("legend").hidden = byId("rings").hidden = false;
}

function drawContacts(table) {
  if (!isNew(byId("contacts"), table.contacts)) return;
  const rows = table.contacts.map((contact) => {
    const row = make("tr");
    const cells = [contact.address, contact.id, contact.shared, contact.stale ? "silent" : "answers"];
    row.append(...cells.map((cell) => make("td", "", cell)));
    return row;
  });
  if (!rows.length) rows.push(make("tr"));
  if (!table.contacts.length) rows[0].append(make("td", "", "nobody"));
  byId("contacts").replaceChildren(...rows);
}

// -- events ----------------------------------------------------------------------------------------------------------

const NAMES = { neighbour: "neighbour", failed: "not refreshed" };

function moment(date) {
  const time = date.toLocaleTimeString([], { hour12: false });
  return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString("sv")}\n${time}`;
}

function drawEvents(events) {
  if (!isNew(byId("events"), events, new Date().toDateString())) return;
  const rows = events.map((event) => {
    const row = make("li");
    const middle = make("span", "", event.subject + (event.count > 1 ? ` and ${event.count - 1} more` : ""));
    if (event.text) middle.append(make("span", "text", event.text));
    const time = make("time", "", moment(new Date(event.at)));
    time.dateTime = new Date(event.at).toISOString();
    row.append(make("span", `kind ${event.kind}`, NAMES[event.kind] || event.kind), middle, time);
    return row;
  });
  byId("events").classList.add("drawn");
  byId("events").replaceChildren(...(rows.length ? rows : [make("li", "none", "nothing yet")]));
}

// -- all of it -------------------------------------------------------------------------------------------------------

function say(id, text) {
  if (byId(id).textContent !== String(text)) byId(id).textContent = text;
}

function health(kind, text) {
  byId("health").className = `pill ${kind}`;
  say("health", text);
}

function render(next) {
  state = next;
  arrived = performance.now();
  away = false;
  document.body.classList.remove("away");
  say("name", state.name || "plasm-dht");
  say("publisher", state.publisher || "publishes nothing");
  say("advertised", state.records.filter((record) => record.seq !== undefined).length);
  say("neighbours", state.table.live);
  say("held", state.records_held || 0);
  say("requests", state.traffic.requests.toLocaleString("en"));
  say("bytes", size(state.traffic.bytes));
  say("dht", state.dht || "-");
  health(state.unwell ? "bad" : "good", state.unwell || "well");
  const shown = state.records.map(drawRecord);
  for (const key of cards.keys()) if (!state.records.some((record) => record.key === key)) cards.delete(key);
  if (!shown.length) shown.push(make("p", "none", "Nothing at this moment."));
  const there = byId("records").children;
  if (shown.length !== there.length || shown.some((each, index) => each !== there[index])) {
    byId("records").replaceChildren(...shown);  // else whoever reads in one of them would lose the place
  }
  if (isNew(byId("problems"), state.problems)) {
    byId("problems").replaceChildren(...state.problems.map((problem) => make("li", "", problem)));
  }
  drawSky(state.table, new Set(state.records.flatMap((record) => record.held_by)));
  drawContacts(state.table);
  drawEvents(state.events);
  tick();
}

// Nobody knows what goes on there now: the time stands still, and the page says since when.
function lose() {
  if (away) return;
  away = true;
  document.body.classList.add("away");
  health("away", `not connected: this is how it was at ${new Date().toLocaleTimeString([], { hour12: false })}`);
}

function listen() {
  const source = new EventSource("events");
  source.onmessage = (message) => render(JSON.parse(message.data));
  source.onerror = () => {
    lose();
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 10000);  // refused: the browser would not try again
  };
}

render(JSON.parse(byId("main").dataset.state));
setInterval(tick, 250);
listen();
