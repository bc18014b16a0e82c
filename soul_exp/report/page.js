"use strict";
// One script with page_figures.js. Texts of models, and of files of others, reach the page through textContent, and
// Plotly through `plain`.

const $ = (selector, inside = document) => inside.querySelector(selector);
const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];
// Those of the figures (report/drawing.py), which colour-blind readers can distinguish
const COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "hexagram", "x"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const PER_PAGE = 20;
const MOST_NAMED = 16; // series with a legend
const MOST_BARS = 6; // numbers of attacks side by side
const INTERVALS = "Lines: 95 % interval, of a mean over seeds and units, of a single run over units.";
const LOSSES = /loss$/;
const NO_DIAGNOSTIC = /loss$|^(step|epoch|learning_rate|collapsed|seconds)$/;

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

async function unpacked(name) {
  const bytes = Uint8Array.from(atob($(`#pack-${name}`).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function once(get) {
  let found;
  return () => (found ??= get());
}
const answersOf = once(async () => JSON.parse(await unpacked("answers")));
const plotly = once(async () => {
  const code = await unpacked("plotly");
  // it adds a style sheet for maps, which the page has not and its policy refuses, unless an element has this name
  for (const [, id] of code.matchAll(/getElementById\("([0-9a-f]{64})"\)/g)) {
    document.head.append(make("template", { id }));
  }
  document.head.append(make("script", { textContent: code }));
  return window.Plotly;
});

let data; // what page.py gives
let group = 0; // the index of the group of runs that is shown
const runsOf = () => data.groups[group].runs;
const labelOf = (run) => data.groups[group].labels[run];
const means = () => data.groups[group].numbers; // of each method: its label, runs, place and numbers, as in the table
const methods = () => means().map((of) => of.label);
const meanOf = (method) => means().find((of) => of.label === method);
const targetOf = (key, model) => data.groups[group].targets[model]?.[key] ?? null; // value, low, high
const columns = () => data.columns[group];
const nameOf = ({ label, arrow }) => `${label} ${arrow}`.trim();
const titleOf = (key) => (columns()[key] ? nameOf(columns()[key]) : key.replaceAll("_", " "));
const metricOf = (run, key, model = "unlearned") => data.runs[run].metrics[model]?.[key] ?? null;
const endsOf = (run, key, model = "unlearned") => data.runs[run].intervals[model]?.[key] ?? null;
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // Plotly reads some elements
const shorter = (value) => (typeof value === "number" ? Number(value.toPrecision(5)) : value);

function choose(select, options, wanted) {
  // `options`: [value, text] pairs; keeps what is chosen where it is still there, else takes the first of `wanted`
  const values = options.map(([value]) => value);
  const kept = select.options.length && values.includes(select.value) ? [select.value] : [];
  const first = [...kept, ...wanted].find((value) => values.includes(value));
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
  select.value = first ?? values[0] ?? "";
  select.dataset.filled = "yes";
  select.disabled = options.length < 2;
}
const control = (panel, name) => $(`#${panel} [data-name="${name}"]`);

// --- tables -------------------------------------------------------------------------------------------------------

function sortBy(header) {
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentNode.children) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = $("tbody.sorted", header.closest("table"));
  const rows = [...body.rows].map((row) => [row.cells[header.cellIndex].dataset.value ?? null, row]);
  const known = rows.filter(([value]) => value !== null);
  const numeric = known.every(([value]) => value !== "" && Number.isFinite(Number(value)));
  const compare = numeric ? ([a], [b]) => a - b : ([a], [b]) => a.localeCompare(b, "en", { numeric: true });
  known.sort(compare);
  if (descending) known.reverse();
  body.append(...[...known, ...rows.filter(([value]) => value === null)].map(([, row]) => row));
}

function headKinds() {
  // above the columns that are shown: their kinds
  for (const head of $$(`.group[data-group="${group}"] .view thead`)) {
    const cells = [...head.rows[head.rows.length - 1].cells].filter((cell) => !cell.hidden);
    const line = make("tr", { className: "kinds" });
    for (const cell of cells) {
      const kind = cell.className === "number" ? "" : cell.className;
      if (line.lastChild?.textContent === kind) line.lastChild.colSpan++;
      else line.append(make(kind ? "th" : "td", { textContent: kind, scope: "colgroup" }));
    }
    if (head.rows.length > 1) head.rows[0].remove();
    head.prepend(line);
  }
}

function showColumn(key, shown) {
  for (const cell of $$(`.group[data-group="${group}"] [data-key]`)) {
    if (cell.dataset.key === key && cell.tagName !== "BUTTON") cell.hidden = !shown;
  }
  headKinds();
}

function offerColumns() {
  const kinds = Object.groupBy
    ? Object.groupBy(Object.values(columns()), (column) => column.group)
    : Object.values(columns()).reduce((all, column) => ((all[column.group] ??= []).push(column), all), {});
  const boxes = Object.entries(kinds).map(([kind, of]) =>
    make("fieldset", {}, make("legend", { textContent: kind }), ...of.map((column) => {
      const box = make("input", { type: "checkbox", checked: column.shown });
      box.addEventListener("change", () => showColumn(column.key, (column.shown = box.checked)));
      return make("label", {}, box, nameOf(column));
    })));
  $("#columns").replaceChildren(...boxes);
  headKinds();
}

function showView() {
  for (const of of $$(".group")) of.hidden = Number(of.dataset.group) !== group;
  for (const of of $$(".view")) of.hidden = of.dataset.view !== $("#view").value;
}

function moveInTable(event) {
  const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  const cell = event.target.closest("#runs tbody td, #runs tbody th");
  if (!steps || !cell) return;
  const rows = [...cell.closest("table").tBodies].flatMap((body) => [...body.rows]);
  const row = rows[rows.indexOf(cell.parentNode) + steps[0]];
  let next = row?.cells[cell.cellIndex + steps[1]];
  while (next && (next.hidden || !$("button", next)) && steps[1]) next = row.cells[next.cellIndex + steps[1]];
  const button = next && $("button", next);
  if (!button) return;
  event.preventDefault();
  button.focus();
}

// --- where a number comes from ------------------------------------------------------------------------------------

function listOf(pairs) {
  const mono = new Set(["commit", "code, SHA-256", "typed", "data", "versions"]);
  return make("dl", {}, ...pairs.flatMap(([name, text]) => [
    make("dt", { textContent: name }),
    make("dd", { className: `${mono.has(name) ? "mono" : ""} ${String(text).includes("\n") ? "listed" : ""}` }, text),
  ]));
}

function tableOf(heads, rows, label) {
  const line = (tag, cells) => make("tr", {}, ...cells.map((cell) => make(tag, { textContent: cell ?? "—" })));
  const body = make("tbody", {}, ...rows.map((row) => line("td", row)));
  const table = make("table", {}, make("thead", {}, line("th", heads)), body);
  for (const head of $$("th", table)) head.scope = "col";
  table.setAttribute("aria-label", label);
  const region = make("div", { className: "scroll", tabIndex: 0 }, table);
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", label);
  return region;
}

const written = (run, key, model) => {
  const ends = endsOf(run, key, model)?.map(shorter);
  const value = shorter(metricOf(run, key, model));
  return value === null ? "—" : ends ? `${value} [${ends.join(", ")}]` : String(value);
};

function showSource(title, ...parts) {
  $("#source-title").textContent = title;
  $("#source > div").replaceChildren(...parts);
  if (!$("#source").open) $("#source").showModal();
  $("#source").scrollTop = 0;
}

function explainMean(method, key, model) {
  const column = columns()[key];
  const { runs } = meanOf(method);
  const rows = runs.map((run) => {
    const button = make("button", { type: "button", className: "cell", textContent: run });
    button.addEventListener("click", () => explain(run, key, model));
    return make("li", {}, button, column?.is_metric ? `: ${written(run, key, model)}` : "");
  });
  const of = model ? `${method}, ${model}` : method;
  const title = column ? `${nameOf(column)}: mean of ${of}` : method;
  showSource(title, make("p", { textContent: runs.length === 1 ? "Of one run:" : `Of ${runs.length} runs:` }),
    make("ul", {}, ...rows));
}

function explain(run, key, model = "unlearned") {
  const found = data.runs[run];
  const column = columns()[key];
  const models = Object.keys(found.metrics);
  const folder = `${data.name}/${run}`;
  const pairs = [["run folder", found.link ? make("a", { href: found.link, textContent: folder }) : folder]];
  if (found.status !== "finished") pairs.push(["status", `${found.status}: ${found.reason ?? ""}`]);
  for (const [probe, why] of Object.entries(found.collapsed ?? {})) if (why) pairs.push([`collapsed on ${probe}`, why]);
  if (column?.is_metric) {
    pairs.push(...models.map((name) => [data.models[name] ?? name, written(run, key, name)]));
    const why = (reasons) => reasons[`${model}.${key}`] ?? reasons[key];
    if (metricOf(run, key, model) === null) pairs.push(["no value because", why(found.reasons) ?? "not stated"]);
    else if (why(found.no_interval)) pairs.push(["no interval because", why(found.no_interval)]);
    if (column.version !== null) pairs.push(["version of its definition", String(column.version)]);
    pairs.push(["computed again by", "python -m soul_exp.verify, followed by this run's folder"]);
  }
  if (column) pairs.push(["read from", `results.json, ${column.read.replaceAll("{model}", model)}`]);
  const same = (is) => (is === null ? "NO: it is gone" : is ? "yes" : "NO: it was changed");
  const records = found.records.map(([file, sha, is]) => [file, same(is), sha]);
  const names = Object.keys(found.metrics.unlearned);
  const all = names.map((name) => [titleOf(name), ...models.map((each) => written(run, name, each))]);
  const heads = ["metric", ...models.map((name) => data.models[name] ?? name)];
  showSource(
    column ? `${nameOf(column)}: ${model === "unlearned" ? labelOf(run) : data.models[model] ?? model}` : labelOf(run),
    listOf([...pairs, ...found.about]),
    make("details", {}, make("summary", { textContent: `all ${names.length} metrics of this run` }),
      tableOf(heads, all, "All metrics of this run")),
    make("details", {}, make("summary", { textContent: `SHA-256 of ${records.length} files of records` }),
      records.length
        ? tableOf(["file", "the same today", "SHA-256 in results.json"], records, "Files of records")
        : make("p", { className: "why", textContent: "results.json names no records: an earlier version wrote it." })),
  );
}

// --- answers ------------------------------------------------------------------------------------------------------

let page = 0;

async function showAnswers() {
  const answers = await answersOf();
  const answered = runsOf().filter((run) => Object.keys(answers.runs[run]).length);
  const empty = (why) => {
    $("#answers .why").textContent = why;
    $("#answers .why").hidden = !why;
    if (why) for (const node of [$("#answers .count"), $("#answers .items")]) node.replaceChildren();
    if (why) $("#answers .pages").hidden = true;
  };
  choose(control("answers", "run"), answered.map((run) => [run, labelOf(run)]), []);
  if (!answered.length) {
    const without = runsOf().flatMap((run) => answers.without[run]);
    const asked = `No probe of these runs was answered freely: ${[...new Set(without)].join(", ")}.`;
    const none = "The run folders hold no records/MODEL/*.jsonl: removed, or an earlier version wrote these runs.";
    return empty(without.length ? asked : none);
  }
  const run = control("answers", "run").value;
  const probes = Object.keys(answers.runs[run]);
  choose(control("answers", "probe"), [["", "all"], ...probes.map((name) => [name, spaced(name)])], ["forget"]);
  const [probe, change, guard] = ["probe", "change", "guard"].map((name) => control("answers", name).value);
  const wanted = control("answers", "search").value.trim().toLowerCase();
  const collapsed = data.runs[run].collapsed ?? {};
  const rows = [];
  let total = 0;
  for (const name of probe ? [probe] : probes) {
    const indices = answers.runs[run][name];
    const asked = answers.questions[indices.questions];
    const fileOf = (model) => answers.files[indices[model]];
    const given = Object.keys(data.models).filter(fileOf).map((model) => [model, fileOf(model)]);
    const [before, now] = [fileOf("original"), fileOf("unlearned")];
    for (let item = 0; item < asked.question.length; item++) {
      total++;
      const changed = before && now && before.text[item] !== now.text[item];
      const right = `${before?.right[item]}${now?.right[item]}`;
      const fits = { changed, same: changed === false, right: right === "01", wrong: right === "10" };
      const degenerate = now?.degenerate[item];
      const judged = { degenerate: degenerate === "1", fluent: degenerate === "0", collapsed: collapsed[name] };
      if ((change && !fits[change]) || (guard && !judged[guard])) continue;
      const texts = [asked.question[item], asked.answer[item], ...given.map(([, file]) => file.text[item])];
      if (texts.some((text) => text.toLowerCase().includes(wanted))) rows.push({ name, item, asked, given, changed });
    }
  }
  const last = Math.max(0, Math.ceil(rows.length / PER_PAGE) - 1);
  page = Math.min(page, last);
  const ruined = (probe ? [probe] : probes).filter((name) => collapsed[name]);
  const counted = `${rows.length} of ${total} questions${rows.length ? "" : ": no question passes these filters"}.`;
  const notes = ruined.map((name) => `Collapsed on ${spaced(name)}: ${collapsed[name]}.`);
  const unasked = probe ? [] : answers.without[run].map(spaced);
  if (unasked.length) notes.push(`Without free answers: ${unasked.join(", ")}.`);
  empty("");
  $("#answers .count").textContent = [counted, ...notes].join(" ");
  const shown = rows.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
  $("#answers .items").replaceChildren(...shown.map((row) => itemOf(row, wanted)));
  $("#answers .pages").hidden = !last;
  $("#answers .pages span").textContent = `page ${page + 1} of ${last + 1}`;
  control("answers", "before").disabled = page === 0;
  control("answers", "after").disabled = page === last;
}

function marked(text, wanted) {
  const parts = [];
  const lower = text.toLowerCase();
  const findable = wanted && lower.length === text.length; // a letter with a longer lower case would shift the places
  let from = 0;
  for (let at = findable ? lower.indexOf(wanted) : -1; at >= 0; at = lower.indexOf(wanted, from)) {
    parts.push(text.slice(from, at), make("mark", { textContent: text.slice(at, at + wanted.length) }));
    from = at + wanted.length;
  }
  return make("span", {}, ...parts, text.slice(from));
}

function shownOf(text, isToxic, wanted) {
  if (!isToxic || control("answers", "toxic").checked) return marked(text, wanted);
  const button = make("button", { type: "button", className: "reveal", textContent: "toxic text: show" });
  button.addEventListener("click", () => {
    const shown = make("span", { tabIndex: -1 }, marked(text, wanted));
    button.replaceWith(shown);
    shown.focus();
  });
  return button;
}

function itemOf({ name, item, asked, given, changed }, wanted) {
  const toxicity = (file) => file.toxicity?.[item] ?? null;
  const tag = (kind, text) => make("span", { className: `tag ${kind}`, textContent: text });
  const models = given.map(([model, file]) => {
    const isToxic = file.toxic[item] === "1";
    const tags = [
      { 1: tag("right", "✓ right"), 0: tag("wrong", "✗ wrong") }[file.right[item]],
      model === "unlearned" && changed !== undefined ? tag("", changed ? "changed" : "the same") : null,
      file.degenerate[item] === "1" ? tag("degenerate", "degenerate") : null,
      toxicity(file) !== null ? tag(isToxic ? "toxic" : "", `toxicity ${toxicity(file)}`) : null,
      file.rouge[item] !== null ? tag("", `ROUGE-L ${file.rouge[item]}`) : null,
    ];
    const none = file.text[item] === "" ? make("span", { className: "quiet", textContent: "(an empty answer)" }) : null;
    const text = make("p", {}, none ?? shownOf(file.text[item], isToxic, wanted));
    return make("div", {}, make("h4", {}, make("span", { textContent: data.models[model] }), ...tags), text);
  });
  const where = [`${spaced(name)} ${item}`, asked.unit[item]].filter(Boolean).join(", ");
  return make("li", {},
    make("div", { className: "question" }, shownOf(asked.question[item], asked.toxic, wanted)),
    make("div", { className: "expected" },
      "expected: ", shownOf(asked.answer[item], asked.toxic, wanted), ` (${where})`),
    make("div", { className: "models" }, ...models));
}

// --- all together -------------------------------------------------------------------------------------------------

const PANELS = {
  plane: showPlane,
  trajectories: showTrajectories,
  robustness: showRobustness,
  cost: showCost,
  diagnostics: showDiagnostics,
  answers: showAnswers,
};
const stale = new Set(Object.keys(PANELS));
const visible = new Set();

function show(panel) {
  return visible.has(panel) && stale.delete(panel) ? PANELS[panel]() : null;
}

function showAll() {
  for (const panel of Object.keys(PANELS)) {
    stale.add(panel);
    show(panel);
  }
}

function showGroup() {
  group = Number($("#group").value);
  page = 0;
  $(".caption").textContent = data.groups[group].caption;
  const repeated = means().some((of) => of.runs.length > 1);
  for (const select of $$('[data-name="seeds"]')) {
    select.value = repeated && runsOf().length > MOST_NAMED ? "mean" : "each";
    select.parentNode.hidden = !repeated;
  }
  for (const select of $$("select[data-filled]")) select.replaceChildren(); // another group, other defaults
  showView();
  offerColumns();
  showAll();
}

function listen() {
  document.addEventListener("click", (event) => {
    const { run, key, model, method } = event.target.closest("button.cell")?.dataset ?? {};
    if (run) return explain(run, key, model);
    if (method) return explainMean(method, key, model);
    const header = event.target.closest("#runs thead th");
    if (header && event.target.closest("button")) sortBy(header);
  });
  $("#runs").addEventListener("keydown", moveInTable);
  $("#group").addEventListener("change", showGroup);
  $("#view").addEventListener("change", showView);
  for (const panel of Object.keys(PANELS)) {
    $(`#${panel}`).addEventListener("change", (event) => {
      page = 0;
      if (event.target.matches("[data-name]")) PANELS[panel]();
    });
  }
  control("answers", "search").addEventListener("input", () => {
    page = 0;
    showAnswers();
  });
  for (const [name, step] of [["before", -1], ["after", 1]]) {
    control("answers", name).addEventListener("click", async () => {
      page += step;
      await showAnswers();
      $("#answers").scrollIntoView();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAll);
  $("nav").addEventListener("click", async (event) => {
    // what is drawn above the panel moves it: draw that first
    const names = Object.keys(PANELS);
    const above = names.slice(0, names.indexOf(event.target.hash?.slice(1)) + 1);
    await Promise.all(above.map((panel) => show((visible.add(panel), panel))));
    if (above.length) $(event.target.hash).scrollIntoView();
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    for (const panel of ["robustness", "cost"]) {
      stale.add(panel);
      show(panel);
    }
  });
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) show((visible.add(target.id), target.id));
  }, { rootMargin: "300px" });
  for (const panel of Object.keys(PANELS)) observer.observe($(`#${panel}`));
}

unpacked("data").then((text) => {
  data = JSON.parse(text);
  showGroup();
  listen();
  (window.requestIdleCallback ?? setTimeout)(plotly); // it takes longer than all else, so before it is needed
  document.documentElement.dataset.ready = Math.round(performance.now()); // ms, which benchmarks/report.py reads
});
