"use strict";
// Everything in the data was written by a model, so it only ever becomes text nodes, never markup.

const PAGE_SIZE = 50;
const FACETS = ["task_type", "language", "model", "verdict"];
const { columns, rows, languages } = JSON.parse(document.getElementById("data").textContent);
const records = rows.map((row) => Object.fromEntries(columns.map((name, place) => [name, row[place]])));
const byId = (id) => document.getElementById(id);

let matches = records;
let page = 0;
let selected = 0; // place in `matches`
let words = [];

function element(name, { text, words, ...attributes } = {}, children = []) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) appendText(node, String(text), words);
  node.append(...children);
  return node;
}

// Append text with the searched words marked.
function appendText(node, text, words = []) {
  if (!words.length) {
    node.append(text);
    return;
  }
  const escaped = words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  text.split(new RegExp(`(${escaped.join("|")})`, "giu")).forEach((part, place) => {
    if (part) node.append(place % 2 ? element("mark", { text: part }) : part);
  });
}

function languageName(code) {
  return Object.hasOwn(languages, code) ? `${languages[code]} (${code})` : code;
}

function languageLabel(record) {
  const pair = new Set([record.language, record.document_language].filter(Boolean));
  return [...pair].join(" → ");
}

const verdictOf = (record) => record.dropped_by || "kept";
const VALUES = {
  task_type: (record) => [record.task_type],
  language: (record) => [...new Set([record.language, record.document_language])],
  model: (record) => [record.model],
  verdict: (record) => (record.dropped_by ? ["dropped", record.dropped_by] : ["kept"]),
};
const LABELS = {
  language: languageName,
  verdict: (value) => (["kept", "dropped"].includes(value) ? value : `dropped: ${value}`),
};

function fillFacets() {
  for (const facet of FACETS) {
    const counts = new Map();
    for (const record of records) {
      for (const value of VALUES[facet](record)) if (value) counts.set(value, (counts.get(value) || 0) + 1);
    }
    const select = byId(facet);
    select.append(element("option", { value: "", text: "all" }));
    for (const [value, count] of [...counts].sort((a, b) => b[1] - a[1])) {
      const label = (LABELS[facet] || String)(value);
      select.append(element("option", { value, text: `${label} · ${count.toLocaleString("en")}` }));
    }
    select.disabled = counts.size < 2;
  }
}

function searchText(record) {
  record.searchText ??= [record.id, record.instruction, record.query, record.positive, record.negative, record.line]
    .filter(Boolean).join("\n").toLowerCase();
  return record.searchText;
}

function applyFilters() {
  words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = FACETS.map((facet) => [facet, byId(facet).value]).filter(([, value]) => value);
  matches = records.filter((record) =>
    wanted.every(([facet, value]) => VALUES[facet](record).includes(value)) &&
    words.every((word) => searchText(record).includes(word)));
  page = 0;
  selected = 0;
  showPage();
}

function showPage() {
  const pages = Math.max(1, Math.ceil(matches.length / PAGE_SIZE));
  const start = page * PAGE_SIZE;
  const shown = matches.slice(start, start + PAGE_SIZE);
  byId("count").textContent = matches.length === records.length
    ? `${records.length.toLocaleString("en")} records`
    : `${matches.length.toLocaleString("en")} of ${records.length.toLocaleString("en")} records`;
  byId("page").textContent = `page ${(page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page >= pages - 1;
  const list = byId("list");
  list.replaceChildren(...shown.map((record, offset) => listItem(record, start + offset)));
  list.scrollTop = 0;
  if (!shown.length) list.append(element("li", { class: "empty", role: "presentation", text: "No record matches." }));
  select(Math.min(Math.max(selected, start), Math.max(matches.length - 1, 0)));
}

function tags(record) {
  const parts = [element("span", { class: "tag type", text: record.task_type || "unreadable" })];
  if (record.language) parts.push(element("span", { class: "tag", text: languageLabel(record) }));
  if (record.dropped_by) parts.push(element("span", { class: "tag bad", text: record.dropped_by }));
  parts.push(element("span", { class: "id", text: record.id || "" }));
  return element("div", { class: "tags" }, parts);
}

function listItem(record, place) {
  const text = element("div", { class: "query", dir: "auto", lang: record.language || "", text: (record.query || record.line || "").slice(0, 400), words });
  const item = element("li", { role: "option", id: `record-${place}`, "aria-selected": "false" }, [tags(record), text]);
  item.addEventListener("click", () => select(place));
  return item;
}

function select(place) {
  selected = place;
  const list = byId("list");
  list.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
  const item = byId(`record-${place}`);
  if (item) {
    item.setAttribute("aria-selected", "true");
    item.scrollIntoView({ block: "nearest" });
    list.setAttribute("aria-activedescendant", item.id);
  } else {
    list.removeAttribute("aria-activedescendant");
  }
  showDetail(matches[place]);
}

function move(step) {
  const place = selected + step;
  if (place < 0 || place >= matches.length) return;
  selected = place;
  const wanted = Math.floor(place / PAGE_SIZE);
  if (wanted === page) {
    select(place);
  } else {
    page = wanted;
    showPage();
  }
}

function turn(step) {
  const pages = Math.ceil(matches.length / PAGE_SIZE);
  if (page + step < 0 || page + step >= pages) return;
  page += step;
  selected = page * PAGE_SIZE;
  showPage();
}

function textBlock(name, text, language) {
  const length = `${text.length.toLocaleString("en")} characters`;
  return element("div", {}, [
    element("h3", { text: name }, [element("span", { text: length })]),
    element("p", { class: `text ${name}`, dir: "auto", lang: language || "", text, words }),
  ]);
}

function showDetail(record) {
  const detail = byId("detail");
  detail.scrollTop = 0;
  if (!record) {
    detail.replaceChildren(element("p", { class: "empty", text: "Nothing to show." }));
    return;
  }
  const parts = [tags(record)];
  if (record.dropped_by) {
    parts.push(element("p", { class: "reason", dir: "auto", text: `Dropped by ${record.dropped_by}: ${record.reason}` }));
  }
  if (record.line) parts.push(textBlock("line", record.line));
  if (record.instruction) parts.push(textBlock("instruction", record.instruction, "en"));
  if (record.query) parts.push(textBlock("query", record.query, record.language));
  const documents = ["positive", "negative"].filter((name) => record[name]);
  if (documents.length) {
    const blocks = documents.map((name) => textBlock(name, record[name], record.document_language));
    parts.push(element("div", { class: "pair" }, blocks));
  }
  const drawn = { ...record.placeholders };
  if (record.model) drawn.model = record.model;
  if (Object.keys(drawn).length) {
    parts.push(element("h3", { text: "drawn for this record" }));
    const pairs = Object.entries(drawn).flatMap(([name, value]) =>
      [element("dt", { text: name }), element("dd", { dir: "auto", text: typeof value === "object" ? JSON.stringify(value) : value })]);
    parts.push(element("dl", { class: "placeholders" }, pairs));
  }
  detail.replaceChildren(...parts);
}

function showTab(name) {
  for (const tab of ["records", "overview"]) {
    byId(tab).hidden = tab !== name;
    byId(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    byId(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
  }
  history.replaceState(null, "", `#${name}`);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  if (target.getAttribute?.("role") === "tab") {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = target.id === "tab-records" ? "overview" : "records";
    showTab(other);
    byId(`tab-${other}`).focus();
    return;
  }
  if (event.key === "Escape" && target.id === "search") {
    target.value = "";
    applyFilters();
    byId("list").focus();
    return;
  }
  if (target.tagName === "SELECT" || (target.tagName === "INPUT" && event.key !== "ArrowDown")) return;
  const actions = {
    "/": () => byId("search").focus(),
    ArrowDown: () => move(1),
    ArrowUp: () => move(-1),
    j: () => move(1),
    k: () => move(-1),
    ArrowRight: () => turn(1),
    ArrowLeft: () => turn(-1),
  };
  if (byId("records").hidden || !Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  if (target.tagName === "INPUT") byId("list").focus();
  else actions[event.key]();
}

let timer;
byId("search").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(applyFilters, 120);
});
for (const facet of FACETS) byId(facet).addEventListener("change", applyFilters);
byId("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  applyFilters();
});
byId("filters").addEventListener("reset", () => setTimeout(applyFilters));
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
for (const tab of ["records", "overview"]) byId(`tab-${tab}`).addEventListener("click", () => showTab(tab));
document.addEventListener("keydown", onKey);

fillFacets();
showPage();
if (location.hash === "#overview") showTab("overview");
