// --- figures ------------------------------------------------------------------------------------------------------

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const title = (text) => ({ title: { text: plain(text) } });
const rule = () => ({ type: "line", line: { color: style("--text"), dash: "dot", width: 1.5 } }); // the retrained model
const spaced = (name) => name.replaceAll("_", " ");

function lookOf(method) {
  const { place } = meanOf(method); // the diverged seeds of a method have the place of the others
  const of = (looks) => looks[place % looks.length];
  return { colour: of(COLOURS), symbol: of(SYMBOLS), dash: of(DASHES) };
}

function explainEmpty(panel, why) {
  const says = $(`#${panel} .why`);
  says.textContent = why;
  says.hidden = !why;
  $(`#${panel} figure`).hidden = Boolean(why);
}

function layoutOf(layout, numNames, width) {
  const named = numNames > 1 && numNames <= MOST_NAMED;
  const legendLines = named ? Math.ceil(numNames / Math.max(1, Math.floor(width / 180))) : 0;
  const [text, line] = [style("--text"), style("--line")];
  const full = {
    height: 380 + 20 * legendLines,
    margin: { l: 60, r: 16, t: 12, b: 48 },
    hovermode: "closest",
    dragmode: matchMedia("(pointer: fine)").matches && "zoom",
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, family: style("font-family") || "system-ui, sans-serif", size: 13 },
    hoverlabel: { bgcolor: style("--raised"), bordercolor: line, font: { color: text }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    showlegend: named,
    ...layout,
  };
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: style("--quiet"), tickcolor: line };
  for (const key of Object.keys(full).filter((name) => /^[xy]axis/.test(name))) {
    const heading = { font: { size: 13 }, standoff: 8, ...full[key].title };
    full[key] = { ...axis, ticks: "outside", automargin: true, ...full[key], title: heading };
  }
  return full;
}

async function draw(panel, traces, layout, caption) {
  explainEmpty(panel, "");
  const node = $(`#${panel} .chart`);
  const numNames = new Set(traces.map((trace) => trace.name)).size;
  $(`#${panel} figcaption`).textContent = caption + (numNames > MOST_NAMED ? " Point at a line for its name." : "");
  node.setAttribute("aria-label", `${caption} ${numNames} series; the numbers follow in a table.`);
  const Plotly = await plotly();
  const config = { displayModeBar: false, responsive: true };
  const drawing = Plotly.react(node, traces, layoutOf(layout, numNames, node.clientWidth), config);
  const details = $(`#${panel} details.figures`);
  details.ontoggle = () => details.open && fillNumbers(panel, node);
  details.ontoggle();
  await drawing;
  $("#js-plotly-tester")?.setAttribute("aria-hidden", "true"); // where it measures texts
  if (node.dataset.listens) return;
  node.dataset.listens = "yes";
  node.on("plotly_click", ({ points: [{ customdata }] }) => customdata?.[0] && explain(customdata[0]));
}

function fillNumbers(panel, node) {
  const raw = (text) => (typeof text === "string" ? text.replaceAll("&lt;", "<").replaceAll("&amp;", "&") : text);
  const cell = (trace, axis, place) => {
    const [value, error] = [trace[axis][place], trace[`error_${axis}`]];
    const [below, above] = [error?.arrayminus[place], error?.array[place]];
    if (!below && !above) return shorter(raw(value));
    return `${shorter(value)} [${shorter(value - below)}, ${shorter(value + above)}]`;
  };
  const rows = node.data.flatMap((trace) => [...trace.x].map((_, place) =>
    [raw(trace.text?.[place] ?? trace.meta ?? trace.name), cell(trace, "x", place), cell(trace, "y", place)]));
  const heading = (axis) => raw(node.layout[`${axis}axis`]?.title?.text ?? { x: "value", y: "method" }[axis]);
  const region = tableOf(["series", heading("x"), heading("y")], rows, "The numbers of this figure");
  $(`#${panel} details.figures > div`).replaceChildren(...region.children);
}

const isKnown = (value) => value !== null && value !== undefined;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const isCollapsed = (run) => Object.values(data.runs[run].collapsed ?? {}).some(Boolean);
const isDiverged = (run) => data.runs[run].status === "diverged";
const optionsOf = (found) => found.map((column) => [column.key, nameOf(column)]);

function measured(groups) {
  const has = (key) => runsOf().some((run) => isKnown(metricOf(run, key)));
  return Object.values(columns()).filter((c) => c.is_metric && groups.includes(c.group) && has(c.key));
}

function around(found, color) {
  // error bars from [value, low, high], whose low and high may be null
  const to = (end) => found.map((of) => (isKnown(of?.[end]) ? Math.abs(of[end] - of[0]) : 0));
  return { type: "data", symmetric: false, thickness: 1.2, width: 3, arrayminus: to(1), array: to(2), color };
}

function unitsOf(panel) {
  // what a figure draws as one: a run, or the runs of a method, which differ in their seed only
  if (control(panel, "seeds").value === "each")
    return means().flatMap(({ label, runs }) => runs.map((run) => ({ label: labelOf(run), method: label, runs: [run] })));
  return means().map(({ label, runs }) => ({ label, method: label, runs }));
}

function numberOf({ method, runs }, key) {
  // value, low and high of a unit: of one run its own, else those of the table of means; null without a value
  if (runs.length > 1) return meanOf(method).numbers[key] ?? null;
  const value = metricOf(runs[0], key);
  return isKnown(value) ? [value, ...(endsOf(runs[0], key) ?? [null, null])] : null;
}

function meanCurve(curves) {
  // of curves of points [x, y, ...]; where some have no point, it is the mean of the others
  if (curves.length === 1) return curves[0];
  const at = new Map();
  for (const [x, y, ...rest] of curves.flat()) if (isKnown(y)) at.set(x, [...(at.get(x) ?? []), [y, rest]]);
  return [...at].map(([x, found]) => [x, mean(found.map(([y]) => y)), ...found[0][1]]);
}

function showPlane() {
  const [x, y] = [measured(["efficacy", "other"]), measured(["utility", "other"])];
  if (!x.length || !y.length) {
    const lacking = x.length ? "utility" : "forgetting";
    return explainEmpty("plane", `No run has a metric of ${lacking}: the stage evaluate computes them.`);
  }
  choose(control("plane", "x"), optionsOf(x), ["log10_forget_quality", "forget_ks_distance", "forget_rouge"]);
  choose(control("plane", "y"), optionsOf(y), ["utility", "retain_rouge", "retain_probability"]);
  const keys = ["x", "y"].map((name) => control("plane", name).value);
  const units = unitsOf("plane").map((unit) => ({ ...unit, at: keys.map((key) => numberOf(unit, key)) }));
  const known = units.filter((unit) => unit.at.every(isKnown));
  if (!known.length) {
    return explainEmpty("plane", `No run has both ${keys.map(titleOf).join(" and ")}: choose other metrics.`);
  }
  const points = (name, found, colour, symbols, size) => ({
    type: "scatter",
    mode: "markers",
    name,
    x: found.map(({ at: [of] }) => of[0]),
    y: found.map(({ at: [, of] }) => of[0]),
    error_x: around(found.map(({ at: [of] }) => of), colour),
    error_y: around(found.map(({ at: [, of] }) => of), colour),
    marker: { color: colour, symbol: symbols, size, line: { width: 1.5, color: colour } },
    customdata: found.map(({ runs }) => runs),
    text: found.map(({ label }) => plain(label)),
    hovertemplate: "%{text}<br>%{x:.4~g}, %{y:.4~g}<extra></extra>",
  });
  const traces = methods().map((method) => {
    const found = known.filter((unit) => unit.method === method);
    const { colour, symbol } = lookOf(method);
    const symbols = found.map(({ runs }) =>
      runs.some(isDiverged) ? "x-thin-open" : symbol + (runs.some(isCollapsed) ? "-open" : ""));
    return points(plain(method), found, colour, symbols, 11);
  });
  for (const [model, symbol] of [["retrained", "star"], ["original", "square-open"]]) {
    const at = keys.map((key) => targetOf(key, model));
    if (!at.every(isKnown) || (model === "original" && !control("plane", "original").checked)) continue;
    traces.push(points(model, [{ at, runs: [], label: model }], style("--text"), symbol, 14));
  }
  const missing = units.length - known.length;
  const [xaxis, yaxis] = keys.map((key) => title(titleOf(key)));
  const notes = `${INTERVALS} Open: collapsed; thin cross: diverged.${missing ? ` ${missing} without these metrics.` : ""}`;
  return draw("plane", traces.filter((trace) => trace.x.length), { xaxis, yaxis }, notes);
}

function curveNames(of, filter = () => true) {
  return [...new Set(runsOf().flatMap((run) => Object.keys(data.runs[run].steps[of])))].filter(filter);
}

function lines(panel, of, measure, against, caption) {
  const traces = [];
  let without = 0;
  for (const { label, method, runs } of unitsOf(panel)) {
    const steps = runs.map((run) => data.runs[run].steps[of]).filter((found) => found[against] && found[measure]);
    without += runs.length - steps.length;
    if (!steps.length) continue;
    const points = meanCurve(steps.map((found) =>
      found[against].map((x, place) => [x, found[measure][place], found.collapsed?.[place] ?? ""])));
    const why = points.map((point) => point[2]);
    const { colour, symbol, dash } = lookOf(method);
    traces.push({
      type: "scatter",
      mode: of === "validation" ? "lines+markers" : "lines",
      name: plain(method),
      legendgroup: method,
      showlegend: !traces.some((trace) => trace.legendgroup === method),
      meta: plain(label),
      x: points.map(([x]) => x),
      y: points.map(([, y]) => y),
      line: { color: colour, dash, width: 1.8 },
      marker: {
        color: colour,
        size: 9,
        line: { width: why.map((text) => (text ? 2.5 : 0)) },
        symbol: why.map((text) => (text ? "x-thin-open" : symbol)),
      },
      customdata: why.map((text) => [runs[0], plain(text)]),
      hovertemplate: `${plain(label)}<br>${against} %{x:.4~g}: %{y:.4~g}<br>%{customdata[1]}<extra></extra>`,
    });
  }
  if (traces.length === 1) traces[0].line.dash = "solid";
  const target = of === "validation" ? targetOf(measure, "retrained")?.[0] : null;
  const shapes = isKnown(target) ? [{ ...rule(), xref: "paper", x0: 0, x1: 1, y0: target, y1: target }] : [];
  const notes = [caption, shapes.length ? "Dotted: the retrained model." : ""];
  if (without) notes.push(`${without} of ${runsOf().length} runs did not log it.`);
  const xaxis = title(against === "seconds" ? "seconds of training" : "steps");
  return draw(panel, traces, { shapes, xaxis, yaxis: title(titleOf(measure)) }, notes.filter(Boolean).join(" "));
}

const NO_STEPS = "these runs evaluate a given model, or their train.jsonl is missing.";

function showTrajectories() {
  const validation = curveNames("validation", (name) => !/^(step|seconds|collapsed)$/.test(name));
  const losses = curveNames("training", (name) => LOSSES.test(name));
  if (!validation.length && !losses.length) return explainEmpty("trajectories", `No run logged a step: ${NO_STEPS}`);
  const options = [
    ...validation.map((name) => [`validation:${name}`, titleOf(name)]),
    ...losses.map((name) => [`training:${name}`, `training ${titleOf(name)}`]),
  ];
  const best = validation.length ? ["validation:validation_log10_forget_quality"] : ["training:forget_loss"];
  const wanted = [...best, ...options.map(([value]) => value)];
  choose(control("trajectories", "measure"), options, wanted);
  const [of, measure] = control("trajectories", "measure").value.split(":");
  const against = control("trajectories", "against");
  const timed = curveNames(of).includes("seconds");
  against.disabled = !timed;
  if (!timed) against.value = "step";
  const notes = {
    validation: "On the validation part. A cross: the collapse guard found a ruined model.",
    training: validation.length ? "" : "No run measured the validation part during training: evaluate.every=50 does.",
  };
  return lines("trajectories", of, measure, against.value, notes[of]);
}

function showDiagnostics() {
  const found = curveNames("training", (name) => !NO_DIAGNOSTIC.test(name));
  if (!found.length) return explainEmpty("diagnostics", `No run logged numbers of its optimizer: ${NO_STEPS}`);
  const wanted = ["win_rate", "effective_update", "update_norm"];
  choose(control("diagnostics", "measure"), found.map((name) => [name, name]), wanted);
  const measure = control("diagnostics", "measure").value;
  const meaning = {
    win_rate: "win_rate: the share of coordinates that were not clipped; near 0 the optimizer steps by signs.",
    effective_update: "effective_update: the share of weights that changed after rounding.",
  };
  return lines("diagnostics", "training", measure, "step", meaning[measure] ?? "");
}

function showBars() {
  const all = measured(["robustness"]);
  if (!all.length) {
    const attacked = runsOf().some((run) => Object.keys(data.runs[run].attacks).length);
    const type = "Type the command of a run again with 'stages=[prepare,unlearn,evaluate,attack]' 'attack=[relearn]'.";
    return explainEmpty("bars", attacked ? "The attacks gave no number." : `No run was attacked. ${type}`);
  }
  const excesses = all.filter((column) => /_excess|_recovery|^uds/.test(column.key)).slice(0, MOST_BARS);
  const several = excesses.length > 1 ? [["", "excess and recovery"]] : [];
  choose(control("robustness", "columns"), [...several, ...optionsOf(all)], [""]);
  const one = control("robustness", "columns").value;
  const shown = one ? all.filter((column) => column.key === one) : excesses;
  const perRow = Math.max(1, Math.min(shown.length, Math.floor($("#bars").clientWidth / 300)));
  const numRows = Math.ceil(shown.length / perRow);
  const names = methods();
  const height = numRows * (names.length * 24 + 76);
  const margin = { l: 8, r: 16, t: 30, b: 36 };
  const layout = { barmode: "overlay", showlegend: false, annotations: [], shapes: [], margin, height };
  const traces = shown.map((column, place) => {
    const [x, y] = ["x", "y"].map((axis) => axis + (place ? place + 1 : ""));
    const [row, at] = [Math.floor(place / perRow), place % perRow];
    const across = [at / perRow + (at ? 0.015 : 0), (at + 1) / perRow - 0.015];
    const [below, above] = [row + 1 < numRows ? 46 / height : 0, row ? 28 / height : 0];
    const down = [1 - (row + 1) / numRows + below, 1 - row / numRows - above];
    layout[x.replace("x", "xaxis")] = { domain: across, anchor: y, zeroline: true, zerolinewidth: 1.5, nticks: 5 };
    layout[y.replace("y", "yaxis")] = {
      domain: down, anchor: x, autorange: "reversed", showticklabels: at === 0, ticks: "", showgrid: false,
    };
    layout.annotations.push({
      text: plain(nameOf(column)), showarrow: false, font: { size: 13, color: style("--text") },
      xref: "paper", yref: "paper", x: across[0], y: down[1], xanchor: "left", yanchor: "bottom",
    });
    const target = targetOf(column.key, "retrained")?.[0];
    const where = { xref: x, x0: target, x1: target, yref: `${y} domain`, y0: 0, y1: 1 };
    if (isKnown(target)) layout.shapes.push({ ...rule(), ...where });
    const found = means().map((of) => of.numbers[column.key]);
    return {
      type: "bar",
      orientation: "h",
      name: plain(column.label),
      xaxis: x,
      yaxis: y,
      x: found.map((of) => of?.[0] ?? null),
      y: names.map(plain),
      error_x: around(found, style("--text")),
      marker: { color: names.map((name) => lookOf(name).colour), opacity: 0.85 },
      customdata: means().map((of) => of.runs),
      hovertemplate: "%{y}: %{x:.4~g}<extra></extra>",
    };
  });
  return draw("bars", traces, layout, `Of the unlearned model; dotted: of the retrained one, the control. ${INTERVALS}`);
}

function showCurves() {
  const of = (run) => data.runs[run].attacks;
  const attacks = [...new Set(runsOf().flatMap((run) => Object.keys(of(run))))];
  if (!attacks.length) return explainEmpty("curves", "No run was attacked, so there is no curve.");
  choose(control("robustness", "attack"), attacks.map((name) => [name, spaced(name)]), ["relearn"]);
  const attack = control("robustness", "attack").value;
  const branches = [...new Set(runsOf().flatMap((run) => Object.keys(of(run)[attack] ?? {})))];
  choose(control("robustness", "branch"), branches.map((name) => [name, name]), branches);
  const branch = control("robustness", "branch").value;
  const models = runsOf().flatMap((run) => Object.values(of(run)[attack]?.[branch] ?? {}));
  const measures = [...new Set(models.flatMap(Object.keys))];
  if (!measures.length) return explainEmpty("curves", `The attack ${spaced(attack)} has no points to draw.`);
  choose(control("robustness", "measure"), measures.map((name) => [name, spaced(name)]), ["extraction_strength"]);
  const measure = control("robustness", "measure").value;
  const seen = new Set(); // a curve of a reference that runs share is drawn once
  const traces = [];
  const dashes = { original: "dot", retrained: "dash", unlearned: "solid", unmerged: "dashdot" };
  for (const [model, dash] of Object.entries(dashes)) {
    for (const { label, method, runs } of unitsOf("robustness")) {
      const given = runs.map((run) => of(run)[attack]?.[branch]?.[model]?.[measure]).filter(Boolean);
      const points = given.length ? meanCurve(given) : [];
      const isReference = model === "original" || model === "retrained";
      const key = JSON.stringify([model, points]);
      if (!points.length || (isReference && seen.has(key))) continue;
      seen.add(key);
      const look = isReference ? { colour: style("--quiet"), symbol: "circle" } : lookOf(method);
      const name = isReference ? model : plain(method) + (model === "unmerged" ? ", unmerged" : "");
      const meta = isReference ? model : plain(label);
      traces.push({
        type: "scatter",
        mode: "lines+markers",
        name,
        legendgroup: name,
        showlegend: !traces.some((trace) => trace.name === name),
        meta,
        x: points.map(([point]) => (Number.isFinite(Number(point)) ? Number(point) : plain(point))),
        y: points.map(([, value]) => value),
        line: { color: look.colour, dash, width: 2 },
        marker: {
          size: 8,
          color: look.colour,
          symbol: points.map(([, , informative]) => look.symbol + (informative ? "" : "-open")),
        },
        customdata: points.map(() => runs),
        hovertemplate: `${meta}<br>%{x}: %{y:.4~g}<extra></extra>`,
      });
    }
  }
  const notes = "Dashed: the retrained model under the same attack, the control; dotted: the original one. "
    + "Open: the original model no longer shows there what could be recovered.";
  return draw("curves", traces, { xaxis: title(`point of ${spaced(attack)}`), yaxis: title(spaced(measure)) }, notes);
}

function showRobustness() {
  return Promise.all([showBars(), showCurves()]);
}

function showCost() {
  const stages = Object.keys(columns()).filter((key) => key.startsWith("seconds."));
  if (!stages.length) return explainEmpty("cost", "No run recorded the seconds of a stage.");
  const names = methods();
  const bar = (name, key, look) => ({
    type: "bar",
    orientation: "h",
    name: plain(name),
    x: means().map((of) => of.numbers[key]?.[0] ?? null),
    y: names.map(plain),
    customdata: means().map((of) => of.runs),
    ...look,
  });
  const named = (key) => key.slice("seconds.".length);
  const traces = stages.map((key, place) =>
    bar(named(key), key, {
      marker: { color: COLOURS[place % COLOURS.length], line: { color: style("--page"), width: 1 } },
      hovertemplate: `${plain(named(key))}: %{x:.4~g} s<extra>%{y}</extra>`,
    }));
  traces.push(bar("peak memory", "peak_memory_gib", {
    error_x: around(means().map((of) => of.numbers.peak_memory_gib), style("--text")),
    xaxis: "x2",
    yaxis: "y2",
    showlegend: false,
    marker: { color: style("--quiet") },
    hovertemplate: "%{x:.4~g} GiB<extra>%{y}</extra>",
  }));
  const narrow = $("#cost").clientWidth < 700; // the two stand one above the other
  const rows = names.length * 26;
  const [tall, legend] = narrow ? [2 * rows + 75, 22 * stages.length] : [rows, 30];
  const share = narrow ? rows / tall : 1;
  const yaxis = { autorange: "reversed", ticks: "", showgrid: false };
  return draw("cost", traces, {
    barmode: "stack",
    height: tall + legend + 70,
    margin: { l: 8, r: 16, t: 10, b: 60 },
    showlegend: true,
    xaxis: { ...title("seconds"), domain: narrow ? [0, 1] : [0, 0.66] },
    yaxis: { ...yaxis, domain: [1 - share, 1] },
    xaxis2: { ...title("peak memory (GiB)"), domain: narrow ? [0, 1] : [0.7, 1], anchor: "y2" },
    yaxis2: { ...yaxis, domain: [0, share], anchor: "x2", showticklabels: narrow },
  }, "Means over seeds: wall-clock seconds of each stage, and peak memory of the first rank with its 95 % interval. "
    + "What a cache had ready took no time: prepare and attack of later runs are shorter for that.");
}
