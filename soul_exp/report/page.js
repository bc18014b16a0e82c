"use strict";
// Texts of models and of files of others reach the page through textContent and Plotly's escaped labels only.

const $ = (selector, inside = document) => inside.querySelector(selector);
const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f"]; // Okabe and Ito
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "hexagram", "x"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const PER_PAGE = 20;
const MOST_NAMED = 16; // series with a legend
const RANGES = "Lines: the 95 % interval over units of a single run, else the range of the seeds.";
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
  for (const [, id] of code.matchAll(/getElementById\("([0-9a-f]{64})"\)/g)) document.head.append(make("template", { id }));
  document.head.append(make("script", { textContent: code }));
  return window.Plotly;
});

let data; // what page.py gives
let group = 0; // the index of the group of runs that is shown
const runsOf = () => Object.keys(data.groups[group].labels);
const labelOf = (run) => data.groups[group].labels[run];
const methodOf = (run) => data.groups[group].methods[run];
const methods = () => [...new Set(runsOf().map(methodOf))];
const columns = () => data.columns[group];
const titleOf = (key) => (columns()[key] ? `${columns()[key].label} ${columns()[key].arrow}`.trim() : key.replaceAll("_", " "));
const metricOf = (run, key, model = "unlearned") => data.runs[run].metrics[model]?.[key] ?? null;
const endsOf = (run, key, model = "unlearned") => data.runs[run].intervals[model]?.[key] ?? null;
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // Plotly reads some elements
const shorter = (value) => (typeof value === "number" ? Number(value.toPrecision(5)) : value);

function choose(select, options, wanted) {
  // `options`: [value, text] pairs; keeps what is chosen where it is still there, else takes the first of `wanted`
  const values = options.map(([value]) => value);
  const kept = select.options.length && values.includes(select.value) ? select.value : wanted.find((value) => values.includes(value));
  select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
  select.value = kept ?? values[0] ?? "";
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
  for (const head of $$(`.group[data-group="${group}"] thead`)) {
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
    ? Object.groupBy(Object.values(columns()), (column) => column.kind)
    : Object.values(columns()).reduce((all, column) => ((all[column.kind] ??= []).push(column), all), {});
  const boxes = Object.entries(kinds).map(([kind, of]) =>
    make("fieldset", {}, make("legend", { textContent: kind }), ...of.map((column) => {
      const box = make("input", { type: "checkbox", checked: column.shown });
      box.addEventListener("change", () => showColumn(column.key, (column.shown = box.checked)));
      return make("label", {}, box, `${column.label} ${column.arrow}`);
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
  const cell = event.target.closest("tbody.sorted td, tbody.sorted th");
  if (!steps || !cell) return;
  const rows = [...cell.closest("tbody").rows];
  const row = rows[rows.indexOf(cell.parentNode) + steps[0]];
  let next = row?.cells[cell.cellIndex + steps[1]];
  while (next?.hidden) next = row.cells[next.cellIndex + steps[1]];
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
    text instanceof Node ? make("dd", {}, text) : make("dd", { textContent: text, className: `${mono.has(name) ? "mono" : ""} ${text.includes("\n") ? "listed" : ""}` }),
  ]));
}

function tableOf(heads, rows, label) {
  const line = (tag, cells) => make("tr", {}, ...cells.map((cell) => make(tag, { textContent: cell ?? "—" })));
  const table = make("table", {}, make("thead", {}, line("th", heads)), make("tbody", {}, ...rows.map((row) => line("td", row))));
  for (const head of $$("th", table)) head.scope = "col";
  table.setAttribute("aria-label", label);
  const region = make("div", { className: "scroll", tabIndex: 0 }, table);
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", label);
  return region;
}

function explain(run, key) {
  const found = data.runs[run];
  const column = columns()[key];
  const models = Object.keys(found.metrics);
  const written = (model, name) => {
    const ends = endsOf(run, name, model)?.map(shorter);
    const value = shorter(metricOf(run, name, model));
    return value === null ? "—" : ends ? `${value} [${ends.join(", ")}]` : String(value);
  };
  const folder = `${data.name}/${run}`;
  const pairs = [["run folder", found.link ? make("a", { href: found.link, textContent: folder }) : folder]];
  if (found.status !== "finished") pairs.push(["status", `${found.status}: ${found.reason ?? ""}`]);
  for (const [probe, why] of Object.entries(found.collapsed ?? {})) if (why) pairs.push([`collapsed on ${probe}`, why]);
  if (column?.is_metric) {
    pairs.push(...models.map((model) => [data.models[model] ?? model, written(model, key)]));
    const why = found.reasons[key] ?? found.reasons[`unlearned.${key}`];
    if (why) pairs.push(["no value because", why]);
    const none = found.no_interval[key] ?? found.no_interval[`unlearned.${key}`];
    if (none) pairs.push(["no interval because", none]);
    pairs.push(["read from", `results.json, metrics.unlearned.${key}`]);
    if (column.version !== null) pairs.push(["version of its definition", String(column.version)]);
    pairs.push(["computed again by", `python -m soul_exp.verify, followed by this run's folder`]);
  } else if (column) {
    pairs.push(["read from", `results.json, ${key}`]);
  }
  $("#source-title").textContent = column ? `${titleOf(key)}: ${labelOf(run)}` : labelOf(run);
  const of = (rows) => rows.map(([file, sha, same]) => [file, sha, same === null ? "not read" : same ? "yes" : "NO"]);
  const names = Object.keys(found.metrics.unlearned);
  const all = names.map((name) => [titleOf(name), ...models.map((model) => written(model, name))]);
  $("#source > div").replaceChildren(
    listOf([...pairs, ...found.about]),
    make("details", {}, make("summary", { textContent: `all ${names.length} metrics of this run` }),
      tableOf(["metric", ...models.map((model) => data.models[model] ?? model)], all, "All metrics of this run")),
    make("details", {}, make("summary", { textContent: `SHA-256 of ${found.records.length} files of records` }),
      found.records.length
        ? tableOf(["file", "in results.json", "the same today"], of(found.records), "Files of records")
        : make("p", { className: "why", textContent: "results.json of this run names no records: it was written by an earlier version." })),
  );
  $("#source").showModal();
  $("#source").scrollTop = 0;
}

// --- figures ------------------------------------------------------------------------------------------------------

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const lookOf = (method) => {
  const place = methods().indexOf(method);
  const of = (looks) => looks[place % looks.length];
  return { colour: of(COLOURS), symbol: of(SYMBOLS), dash: of(DASHES) };
};

function explainEmpty(panel, why) {
  const says = $(`#${panel} .why`);
  says.textContent = why;
  says.hidden = !why;
  $(`#${panel} figure`).hidden = Boolean(why);
}

async function draw(panel, traces, layout, caption) {
  explainEmpty(panel, "");
  const node = $(`#${panel} .chart`);
  const names = new Set(traces.map((trace) => trace.name));
  const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--quiet"), ticks: "outside", tickcolor: style("--line"), automargin: true };
  const named = names.size > 1 && names.size <= MOST_NAMED;
  const legendLines = named ? Math.ceil(names.size / Math.max(1, Math.floor(node.clientWidth / 180))) : 0;
  const full = {
    height: 380 + 20 * legendLines, margin: { l: 60, r: 16, t: 12, b: 48 }, hovermode: "closest", dragmode: matchMedia("(pointer: fine)").matches && "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style("--text"), family: style("font-family") || "system-ui, sans-serif", size: 13 },
    hoverlabel: { bgcolor: style("--raised"), bordercolor: style("--line"), font: { color: style("--text") }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" }, showlegend: named,
    ...layout,
  };
  for (const key of Object.keys(full)) if (/^[xy]axis/.test(key)) full[key] = { ...axis, ...full[key], title: { font: { size: 13 }, standoff: 8, ...full[key].title } };
  $(`#${panel} figcaption`).textContent = names.size > MOST_NAMED ? `${caption} Point at a line for its name.` : caption;
  node.setAttribute("aria-label", `${caption} ${names.size} series; the numbers follow in a table.`);
  const drawing = (await plotly()).react(node, traces, full, { displayModeBar: false, responsive: true });
  const details = $(`#${panel} details.figures`);
  details.ontoggle = () => details.open && fillNumbers(panel, node.data);
  if (details.open) fillNumbers(panel, traces);
  await drawing;
  $("#js-plotly-tester")?.setAttribute("aria-hidden", "true"); // where it measures texts
  if (!node.dataset.listens) {
    node.dataset.listens = "yes";
    node.on("plotly_click", (event) => event.points[0].customdata?.[0] && explain(event.points[0].customdata[0]));
  }
}

function fillNumbers(panel, traces) {
  const rows = traces.flatMap((trace) => [...trace.x].map((x, place) => [trace.meta ?? trace.name, shorter(x), shorter(trace.y[place])]));
  const layout = $(`#${panel} .chart`).layout;
  const title = (axis, otherwise) => layout[axis]?.title?.text ?? otherwise;
  $(`#${panel} details.figures > div`).replaceChildren(...$$("table", tableOf(["series", title("xaxis", "x"), title("yaxis", "y")], rows, "The numbers of this figure")));
}

const around = (pairs) => ({ // error bars from [value, ends]
  type: "data", symmetric: false, thickness: 1.2, width: 3,
  array: pairs.map(([value, ends]) => (ends ? ends[1] - value : 0)),
  arrayminus: pairs.map(([value, ends]) => (ends ? value - ends[0] : 0)),
});
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
// what a figure draws as one: a run, or the runs of a method that differ in their seed only
function unitsOf(panel) {
  if (control(panel, "seeds").value === "each") return runsOf().map((run) => ({ label: labelOf(run), method: methodOf(run), runs: [run] }));
  return methods().map((method) => ({ label: method, method, runs: runsOf().filter((run) => methodOf(run) === method) }));
}
function summaryOf(runs, key) { // the value and, of one run, its interval, else the range of the seeds; null without
  const values = runs.map((run) => metricOf(run, key)).filter(isKnown);
  if (!values.length) return null;
  return { value: mean(values), ends: runs.length === 1 ? endsOf(runs[0], key) : [Math.min(...values), Math.max(...values)] };
}
function meanCurve(curves) { // of [x, y, ...] points; a place that some curve lacks is the mean of the others
  const at = new Map();
  for (const curve of curves) for (const [x, y, ...rest] of curve) if (isKnown(y)) at.set(x, [...(at.get(x) ?? []), [y, rest]]);
  return curves.length === 1 ? curves[0] : [...at].map(([x, found]) => [x, mean(found.map(([y]) => y)), ...found[0][1]]);
}
const isKnown = (value) => value !== null && value !== undefined;
const measured = (kinds) => Object.values(columns()).filter((c) => c.is_metric && kinds.includes(c.kind) && runsOf().some((run) => isKnown(metricOf(run, c.key))));
const optionsOf = (found) => found.map((column) => [column.key, `${column.label} ${column.arrow}`]);

function showPlane() {
  const x = measured(["efficacy", "validation"]);
  const y = measured(["utility", "validation"]);
  if (!x.length || !y.length) return explainEmpty("plane", `No run has a metric of ${x.length ? "utility" : "forgetting"}: the stage evaluate computes them.`);
  choose(control("plane", "x"), optionsOf(x), ["log10_forget_quality", "forget_ks_distance", "forget_rouge"]);
  choose(control("plane", "y"), optionsOf(y), ["utility", "retain_rouge", "retain_probability"]);
  const [kx, ky] = ["x", "y"].map((name) => control("plane", name).value);
  const units = unitsOf("plane").map((unit) => ({ ...unit, x: summaryOf(unit.runs, kx), y: summaryOf(unit.runs, ky) }));
  const known = units.filter((unit) => unit.x && unit.y);
  if (!known.length) return explainEmpty("plane", `No run has both ${titleOf(kx)} and ${titleOf(ky)}: choose other metrics.`);
  const values = (of, axis) => of.map((unit) => unit[axis].value);
  const bars = (of, axis) => around(of.map((unit) => [unit[axis].value, unit[axis].ends]));
  const traces = methods().map((method) => {
    const of = known.filter((unit) => unit.method === method);
    const look = lookOf(method);
    return {
      type: "scatter", mode: "markers", name: plain(method), x: values(of, "x"), y: values(of, "y"),
      error_x: { ...bars(of, "x"), color: look.colour }, error_y: { ...bars(of, "y"), color: look.colour },
      marker: { color: look.colour, symbol: of.map((unit) => look.symbol + (unit.runs.some(isCollapsed) ? "-open" : "")), size: 11, line: { width: 1.5, color: look.colour } },
      customdata: of.map((unit) => [unit.runs[0]]), text: of.map((unit) => plain(unit.label)),
      hovertemplate: "%{text}<br>%{x:.4~g}, %{y:.4~g}<extra></extra>",
    };
  }).filter((trace) => trace.x.length);
  const references = [["retrained", "star"], ...(control("plane", "original").checked ? [["original", "square-open"]] : [])];
  for (const [model, symbol] of references) {
    const run = runsOf().find((name) => isKnown(metricOf(name, kx, model)) && isKnown(metricOf(name, ky, model)));
    if (!run) continue;
    const [of, at] = [[kx, ky].map((key) => around([[metricOf(run, key, model), endsOf(run, key, model)]])), [kx, ky].map((key) => [metricOf(run, key, model)])];
    traces.push({
      type: "scatter", mode: "markers", name: model, x: at[0], y: at[1], error_x: { ...of[0], color: style("--text") }, error_y: { ...of[1], color: style("--text") },
      marker: { color: style("--text"), symbol, size: 14 }, hovertemplate: `${model}<br>%{x:.4~g}, %{y:.4~g}<extra></extra>`,
    });
  }
  const missing = units.length - known.length;
  draw("plane", traces, { xaxis: { title: { text: plain(titleOf(kx)) } }, yaxis: { title: { text: plain(titleOf(ky)) } } },
    `${RANGES} Open: collapsed.${missing ? ` ${missing} without these metrics.` : ""}`);
}
const isCollapsed = (run) => Object.values(data.runs[run].collapsed ?? {}).some(Boolean);

function curveNames(of, filter = () => true) {
  return [...new Set(runsOf().flatMap((run) => Object.keys(data.runs[run].steps[of] ?? {})))].filter(filter);
}

function lines(panel, of, measure, against, caption) {
  const traces = [];
  let without = 0;
  for (const { label, method, runs } of unitsOf(panel)) {
    const steps = runs.map((run) => data.runs[run].steps[of]).filter((found) => found[against] && found[measure]);
    without += runs.length - steps.length;
    if (!steps.length) continue;
    const points = meanCurve(steps.map((found) => found[against].map((x, place) => [x, found[measure][place], found.collapsed?.[place] ?? ""])));
    const why = points.map((point) => point[2]);
    const look = lookOf(method);
    traces.push({
      type: "scatter", mode: of === "validation" ? "lines+markers" : "lines", name: plain(method), legendgroup: method, meta: plain(label),
      showlegend: !traces.some((trace) => trace.legendgroup === method),
      x: points.map(([x]) => x), y: points.map(([, y]) => y), line: { color: look.colour, dash: look.dash, width: 1.8 },
      marker: { color: look.colour, size: 9, line: { width: why.map((text) => (text ? 2.5 : 0)) }, symbol: why.map((text) => (text ? "x-thin-open" : look.symbol)) },
      customdata: why.map((text) => [runs[0], plain(text)]),
      hovertemplate: `${plain(label)}<br>${against} %{x:.4~g}: %{y:.4~g}<br>%{customdata[1]}<extra></extra>`,
    });
  }
  if (traces.length === 1) traces[0].line.dash = "solid";
  const control = of === "validation" && runsOf().map((run) => metricOf(run, measure, "retrained")).find(isKnown);
  const shapes = isKnown(control) && control !== false
    ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: control, y1: control, line: { color: style("--quiet"), dash: "dot", width: 1.5 } }] : [];
  const notes = [caption, shapes.length ? "Dotted: the retrained model." : "", without ? `${without} of ${runsOf().length} runs did not log it.` : ""];
  return draw(panel, traces, { shapes, xaxis: { title: { text: against === "seconds" ? "seconds of training" : "steps" } }, yaxis: { title: { text: plain(titleOf(measure)) } } }, notes.filter(Boolean).join(" "));
}

function showTrajectories() {
  const validation = curveNames("validation", (name) => !/^(step|seconds|collapsed)$/.test(name)).map((name) => [`validation:${name}`, `${titleOf(name)}`]);
  const training = curveNames("training", (name) => LOSSES.test(name)).map((name) => [`training:${name}`, `training ${titleOf(name)}`]);
  if (!validation.length && !training.length) return explainEmpty("trajectories", "No run logged a step: these runs evaluate a given model, or their train.jsonl is missing. Type evaluate.every=50 to measure the validation part every 50 steps.");
  choose(control("trajectories", "measure"), [...validation, ...training], ["validation:validation_log10_forget_quality", "training:forget_loss", "training:loss"]);
  const [of, measure] = control("trajectories", "measure").value.split(":");
  const against = control("trajectories", "against");
  const timed = curveNames(of).includes("seconds");
  against.disabled = !timed;
  if (!timed) against.value = "step";
  lines("trajectories", of, measure, against.value,
    of === "validation" ? "On the validation part. A cross: the collapse guard found a ruined model." : validation.length ? "" : "Training numbers: no run measured the validation part during training; evaluate.every=50 does.");
}

function showDiagnostics() {
  const found = curveNames("training", (name) => !NO_DIAGNOSTIC.test(name));
  if (!found.length) return explainEmpty("diagnostics", "No run logged numbers of its optimizer: these runs evaluate a given model, or their train.jsonl is missing.");
  choose(control("diagnostics", "measure"), found.map((name) => [name, name]), ["win_rate", "effective_update", "update_norm"]);
  const measure = control("diagnostics", "measure").value;
  const meaning = {
    win_rate: "win_rate: the share of coordinates that were not clipped; near 0 the optimizer steps by signs.",
    effective_update: "effective_update: the share of weights that changed after rounding.",
  }[measure];
  lines("diagnostics", "training", measure, "step", meaning ?? "");
}

function showBars() {
  const all = measured(["robustness"]);
  const attacked = runsOf().some((run) => Object.keys(data.runs[run].attacks).length);
  if (!all.length) return explainEmpty("bars", attacked ? "The attacks gave no metric that is not null." : "No run was attacked. Type the command of a run again with 'stages=[prepare,unlearn,evaluate,attack]' 'attack=[relearn,quantise]'.");
  const excesses = all.filter((column) => /_(excess|recovery|uds)|^(rtt_recovery|uds)/.test(column.key));
  choose(control("robustness", "columns"), [...(excesses.length > 1 ? [["", `the ${Math.min(excesses.length, 6)} of excess and recovery`]] : []), ...optionsOf(all)], [""]);
  const one = control("robustness", "columns").value;
  const shown = one ? all.filter((column) => column.key === one) : excesses.slice(0, 6);
  const width = $("#bars").clientWidth;
  const perRow = Math.max(1, Math.min(shown.length, Math.floor(width / 300)));
  const rows = Math.ceil(shown.length / perRow);
  const names = methods();
  const layout = { barmode: "overlay", showlegend: false, annotations: [], shapes: [], margin: { l: 8, r: 16, t: 30, b: 36 } };
  layout.height = rows * (names.length * 24 + 76);
  const traces = [];
  shown.forEach((column, place) => {
    const end = place ? place + 1 : "";
    const [row, at] = [Math.floor(place / perRow), place % perRow];
    const [gapX, gapY] = [0.03, 46 / layout.height];
    const across = [at / perRow + (at ? gapX / 2 : 0), (at + 1) / perRow - gapX / 2];
    const down = [1 - (row + 1) / rows + (row + 1 < rows ? gapY : 0), 1 - row / rows - (row ? 28 / layout.height : 0)];
    layout[`xaxis${end}`] = { domain: across, anchor: `y${end}`, zeroline: true, zerolinewidth: 1.5, nticks: 5 };
    layout[`yaxis${end}`] = { domain: down, anchor: `x${end}`, autorange: "reversed", showticklabels: at === 0, ticks: "", showgrid: false };
    layout.annotations.push({ text: plain(`${column.label} ${column.arrow}`), showarrow: false, xref: "paper", yref: "paper", x: across[0], y: down[1], xanchor: "left", yanchor: "bottom", font: { size: 13, color: style("--text") } });
    const control = runsOf().map((run) => metricOf(run, column.key, "retrained")).find(isKnown);
    if (isKnown(control)) layout.shapes.push({ type: "line", xref: `x${end}`, yref: `y${end} domain`, x0: control, x1: control, y0: 0, y1: 1, line: { color: style("--text"), dash: "dot", width: 1.5 } });
    const of = names.map((method) => runsOf().filter((run) => methodOf(run) === method));
    const found = of.map((runs) => summaryOf(runs, column.key));
    traces.push({
      type: "bar", orientation: "h", name: plain(column.label), y: names.map(plain), x: found.map((each) => each?.value ?? null), xaxis: `x${end}`, yaxis: `y${end}`,
      marker: { color: names.map((name) => lookOf(name).colour), opacity: 0.85 }, error_x: { ...around(found.map((each) => [each?.value, each?.ends])), color: style("--text") },
      customdata: of.map((runs) => [runs[0]]), hovertemplate: "%{y}: %{x:.4~g}<extra></extra>",
    });
  });
  draw("bars", traces, layout, "What the attack gives of the unlearned model; dotted: of the retrained one, the control. " + RANGES);
}

function showCurves() {
  const attacks = [...new Set(runsOf().flatMap((run) => Object.keys(data.runs[run].attacks)))];
  if (!attacks.length) return explainEmpty("curves", "No run was attacked, so there is no curve.");
  choose(control("robustness", "attack"), attacks.map((name) => [name, name.replaceAll("_", " ")]), ["relearn"]);
  const attack = control("robustness", "attack").value;
  const found = runsOf().filter((run) => data.runs[run].attacks[attack]);
  const branches = [...new Set(found.flatMap((run) => Object.keys(data.runs[run].attacks[attack])))];
  choose(control("robustness", "branch"), branches.map((name) => [name, name]), branches);
  const branch = control("robustness", "branch").value;
  const of = found.filter((run) => data.runs[run].attacks[attack][branch]);
  const measures = [...new Set(of.flatMap((run) => Object.values(data.runs[run].attacks[attack][branch]).flatMap(Object.keys)))];
  if (!measures.length) return explainEmpty("curves", `The attack ${attack} has no points that are curves: its metrics stand above.`);
  choose(control("robustness", "measure"), measures.map((name) => [name, name.replaceAll("_", " ")]), ["extraction_strength", ...measures]);
  const measure = control("robustness", "measure").value;
  const seen = new Set(); // control curves that runs share are drawn once
  const traces = [];
  for (const [model, dash] of [["original", "dot"], ["retrained", "dash"], ["unlearned", "solid"], ["unmerged", "dashdot"]]) {
    for (const { label, method, runs } of unitsOf("robustness")) {
      const given = runs.map((run) => data.runs[run].attacks[attack]?.[branch]?.[model]?.[measure]).filter(Boolean);
      if (!given.length) continue;
      const points = meanCurve(given);
      const reference = model === "original" || model === "retrained";
      const key = JSON.stringify([model, points]);
      if (reference && seen.has(key)) continue;
      seen.add(key);
      const look = lookOf(method);
      const name = reference ? model : plain(method) + (model === "unmerged" ? ", unmerged" : "");
      const [colour, symbol] = reference ? [style("--quiet"), "circle"] : [look.colour, look.symbol];
      traces.push({
        type: "scatter", mode: "lines+markers", name, legendgroup: name, showlegend: !traces.some((trace) => trace.name === name), meta: reference ? model : plain(label),
        x: points.map(([point]) => (Number.isFinite(Number(point)) ? Number(point) : plain(point))), y: points.map(([, value]) => value),
        line: { color: colour, dash, width: 2 }, marker: { size: 8, color: colour, symbol: points.map(([, , informative]) => symbol + (informative ? "" : "-open")) },
        customdata: points.map(() => [runs[0]]), hovertemplate: `${reference ? model : plain(label)}<br>%{x}: %{y:.4~g}<extra></extra>`,
      });
    }
  }
  draw("curves", traces, { xaxis: { title: { text: `point of ${attack.replaceAll("_", " ")}` } }, yaxis: { title: { text: plain(measure.replaceAll("_", " ")) } } },
    "Dashed: the retrained model under the same attack, the control; dotted: the original one. Open: the original model no longer shows there what could be recovered.");
}

function showRobustness() {
  showBars();
  showCurves();
}

function showCost() {
  const runs = runsOf();
  const stages = [...new Set(runs.flatMap((run) => Object.keys(data.runs[run].seconds)))];
  if (!stages.length) return explainEmpty("cost", "No run recorded the seconds of a stage.");
  const names = methods();
  const of = names.map((method) => runs.filter((run) => methodOf(run) === method));
  const traces = stages.map((stage, place) => ({
    type: "bar", orientation: "h", name: plain(stage), y: names.map(plain), x: of.map((list) => mean(list.map((run) => data.runs[run].seconds[stage] ?? 0))),
    marker: { color: COLOURS[place % COLOURS.length], line: { color: style("--page"), width: 1 } },
    customdata: of.map((list) => [list[0]]), hovertemplate: `${plain(stage)}: %{x:.4~g} s<extra>%{y}</extra>`,
  }));
  const narrow = $("#cost").clientWidth < 700;
  const rows = names.length * 26;
  traces.push({
    type: "bar", orientation: "h", name: "peak memory", showlegend: false, y: names.map(plain), x: of.map((list) => Math.max(...list.map((run) => data.runs[run].peak_memory_gib))),
    xaxis: "x2", yaxis: "y2", marker: { color: style("--quiet") }, customdata: of.map((list) => [list[0]]), hovertemplate: "%{x:.4~g} GiB<extra>%{y}</extra>",
  });
  const [tall, legend] = [narrow ? 2 * rows + 75 : rows, narrow ? 22 * stages.length : 30];
  const [upper, lower] = narrow ? [[1 - rows / tall, 1], [0, rows / tall]] : [[0, 1], [0, 1]];
  draw("cost", traces, {
    barmode: "stack", height: tall + legend + 70, margin: { l: 8, r: 16, t: 10, b: 60 }, showlegend: true,
    xaxis: { domain: narrow ? [0, 1] : [0, 0.66], anchor: "y", title: { text: "seconds" } },
    yaxis: { domain: upper, autorange: "reversed", ticks: "", showgrid: false },
    xaxis2: { domain: narrow ? [0, 1] : [0.7, 1], anchor: "y2", title: { text: "peak memory (GiB)" } },
    yaxis2: { domain: lower, anchor: "x2", autorange: "reversed", showticklabels: narrow, ticks: "", showgrid: false },
  }, `Wall-clock seconds of each stage, mean over seeds; peak memory of the first rank, the largest of the seeds. What a cache had ready took no time here: prepare and attack of later runs are shorter for that.`);
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
    return empty(without.length ? `No probe of these runs was answered freely (${[...new Set(without)].join(", ")}): the task asks for none.` : "The run folders hold no records: records/MODEL/*.jsonl was removed, or an earlier version wrote them elsewhere.");
  }
  const run = control("answers", "run").value;
  const probes = Object.keys(answers.runs[run]);
  choose(control("answers", "probe"), [["", "all"], ...probes.map((name) => [name, name.replaceAll("_", " ")])], ["forget"]);
  const [probe, change, guard, search] = ["probe", "change", "guard", "search"].map((name) => control("answers", name).value);
  const wanted = search.trim().toLowerCase();
  const collapsed = data.runs[run].collapsed ?? {};
  const rows = [];
  let total = 0;
  for (const name of probe ? [probe] : probes) {
    const indices = answers.runs[run][name];
    const asked = answers.questions[indices.questions];
    const given = Object.keys(data.models).filter((model) => model in indices).map((model) => [model, answers.files[indices[model]]]);
    const [before, now] = ["original", "unlearned"].map((model) => (model in indices ? answers.files[indices[model]] : null));
    for (let item = 0; item < asked.question.length; item++) {
      total++;
      const changed = before && now && before.text[item] !== now.text[item];
      const right = [before, now].map((file) => file?.right[item]);
      const kept = {
        "": true, changed, same: before && now && !changed, right: right[0] === "0" && right[1] === "1", wrong: right[0] === "1" && right[1] === "0",
      }[change] && { "": true, degenerate: now?.degenerate[item] === "1", fluent: now?.degenerate[item] === "0", collapsed: Boolean(collapsed[name]) }[guard];
      if (!kept) continue;
      const texts = [asked.question[item], asked.answer[item], ...given.map(([, file]) => file.text[item])];
      if (!wanted || texts.some((text) => text.toLowerCase().includes(wanted))) rows.push({ name, item, asked, given, changed });
    }
  }
  const last = Math.max(0, Math.ceil(rows.length / PER_PAGE) - 1);
  page = Math.min(page, last);
  const reasons = [...(probe ? [probe] : probes)].filter((name) => collapsed[name]).map((name) => `collapsed on ${name}: ${collapsed[name]}`);
  empty("");
  $("#answers .count").textContent = [`${rows.length} of ${total} questions`, ...reasons].join("; ") + (rows.length ? "." : ": no question passes these filters.");
  $("#answers .items").replaceChildren(...rows.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((row) => itemOf(row, wanted)));
  $("#answers .pages").hidden = !last;
  $("#answers .pages span").textContent = `page ${page + 1} of ${last + 1}`;
  control("answers", "before").disabled = page === 0;
  control("answers", "after").disabled = page === last;
}

function marked(text, wanted) {
  const parts = [];
  const lower = text.toLowerCase();
  let from = 0;
  // a letter whose lower case is longer would shift the places: such a text is not marked
  for (let at = 0; wanted && lower.length === text.length && (at = lower.indexOf(wanted, from)) >= 0; from = at + wanted.length)
    parts.push(text.slice(from, at), make("mark", { textContent: text.slice(at, at + wanted.length) }));
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
  const unit = asked.unit[item] ? `, ${asked.unit[item]}` : "";
  const models = given.map(([model, file]) => {
    const tags = [
      file.right[item] === "1" ? ["right", "✓ right"] : file.right[item] === "0" ? ["wrong", "✗ wrong"] : null,
      model === "unlearned" && changed !== null ? ["", changed ? "changed" : "the same"] : null,
      file.degenerate[item] === "1" ? ["degenerate", "degenerate"] : null,
      file.toxicity?.[item] !== undefined && file.toxicity[item] !== null ? [file.toxic[item] === "1" ? "toxic" : "", `toxicity ${file.toxicity[item]}`] : null,
      file.rouge[item] !== null ? ["", `ROUGE-L ${file.rouge[item]}`] : null,
    ];
    const head = make("h4", {}, make("span", { textContent: data.models[model] }), ...tags.filter(Boolean).map(([kind, text]) => make("span", { className: `tag ${kind}`, textContent: text })));
    const text = file.text[item] === "" ? make("span", { className: "quiet", textContent: "(an empty answer)" }) : shownOf(file.text[item], file.toxic[item] === "1", wanted);
    return make("div", {}, head, make("p", {}, text));
  });
  return make("li", {},
    make("div", { className: "question" }, shownOf(asked.question[item], asked.toxic, wanted)),
    make("div", { className: "expected" }, "expected: ", shownOf(asked.answer[item], asked.toxic, wanted), make("span", { className: "quiet", textContent: ` (${name.replaceAll("_", " ")} ${item}${unit})` })),
    make("div", { className: "models" }, ...models));
}

// --- all together -------------------------------------------------------------------------------------------------

const PANELS = { plane: showPlane, trajectories: showTrajectories, robustness: showRobustness, cost: showCost, diagnostics: showDiagnostics, answers: showAnswers };
const stale = new Set(Object.keys(PANELS));
const visible = new Set();

function show(panel) {
  if (!visible.has(panel) || !stale.delete(panel)) return;
  PANELS[panel]();
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
  const repeated = methods().length < runsOf().length;
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
    const cell = event.target.closest("button.cell");
    if (cell) return explain(cell.dataset.run, cell.dataset.key);
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
