// Draws the figures of a comparison page or a report card from the JSON in #page-data. No network: plotly.js is in the page.
"use strict";
const DATA = JSON.parse(document.getElementById("page-data").textContent);
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
const QUIET = "#8a8f98";
const state = { axis: null, figure: 0, log: false };

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// plotly reads a little HTML in its labels; names are text
const text = s => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const place = id => document.getElementById(id);
const fade = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

function layout(more) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true,
    exponentformat: "SI" };
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12.5, color: css("--ink") },
    margin: { l: 64, r: 16, t: 12, b: 48 }, hovermode: "closest",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    legend: { font: { size: 12 }, bgcolor: "rgba(0,0,0,0)" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--none"), activecolor: css("--accent") },
  };
  const out = Object.assign(base, more);
  for (const key of Object.keys(out)) if (/^[xy]axis/.test(key)) {
    out[key] = Object.assign({}, axis, out[key]);
    if (out[key].title) out[key].title = Object.assign({ font: { size: 12.5 }, standoff: 8 }, out[key].title);
  }
  return out;
}

// ---- curves: every seed thin, the mean thick in its band

function curves(id, spec) {
  const figure = spec.figures[Math.min(state.figure, spec.figures.length - 1)];
  const axis = state.axis || spec.axes[0].key;
  const traces = [], lines = figure.lines;
  const finite = [];
  for (const line of lines) {
    const loud = line.mean || line.seeds.length === 1;
    const legend = { name: text(line.name), legendgroup: line.name };
    for (const seed of line.seeds) {
      if (!seed.x[axis]) continue;
      finite.push(...seed.y.filter(v => v !== null));
      const alone = line.seeds.length === 1;
      traces.push(Object.assign({}, legend, {
        x: seed.x[axis], y: seed.y, mode: seed.y.length < 2 ? "markers" : "lines", type: "scatter",
        line: { color: line.quiet ? fade(line.color, 0.35) : alone ? line.color : fade(line.color, 0.38),
                width: alone && !line.quiet ? 2 : 1 },
        showlegend: alone && !line.quiet && lines.length > 1,
        hovertemplate: "%{y:.5g} at %{x:.4s}<extra>" + text(line.name) + ", seed " + text(seed.seed) + "</extra>",
      }));
    }
    const mean = line.mean;
    if (!mean || !mean.x[axis] || !loud || line.quiet) continue;
    const x = mean.x[axis];
    if (line.band) traces.push(Object.assign({}, legend, { x: x.concat([...x].reverse()), y: mean.high.concat([...mean.low].reverse()),
      fill: "toself", fillcolor: fade(line.color, 0.1), line: { width: 0 }, mode: "lines", type: "scatter",
      hoverinfo: "skip", showlegend: false }));
    traces.push(Object.assign({}, legend, { x, y: mean.y, mode: "lines", type: "scatter", line: { color: line.color, width: 2.4 },
      hovertemplate: "%{y:.5g} at %{x:.4s}<extra>" + text(line.name) + ", mean</extra>", showlegend: lines.length > 1 }));
  }
  // A band of few seeds can be far wider than the curves: the view follows the curves, the band is cut off by it.
  finite.sort((a, b) => a - b);
  const low = finite[0], high = finite[Math.min(finite.length - 1, Math.floor(0.995 * finite.length))];
  const pad = 0.06 * (high - low || Math.abs(low) || 1);
  const y = { title: { text: text(figure.name) } };
  if (finite.length && spec.clip !== false) y.range = [low - pad, high + pad];
  if (!finite.length) y.range = [0, 1];
  const named = spec.axes.find(a => a.key === axis);
  const empty = !traces.length ? [{ text: "no run has " + text(figure.name) + " over " + named.name, showarrow: false,
    xref: "paper", yref: "paper", x: 0.5, y: 0.5 }] : [];
  Plotly.react(id, traces, layout({
    height: spec.height || 440, xaxis: { title: { text: named.name }, type: state.log ? "log" : "linear" }, yaxis: y,
    annotations: empty, legend: { orientation: "h", y: -0.2, font: { size: 12 } },
  }), CONFIG);
}

// ---- final values with their intervals

function finals(id, spec) {
  const rows = spec.rows, names = rows.map(r => text(r.name));
  const traces = [];
  const seeds = rows.flatMap(r => r.values.map(v => [v, text(r.name), r.color]));
  traces.push({ x: seeds.map(s => s[0]), y: seeds.map(s => s[1]), mode: "markers", type: "scatter", hovertemplate: "%{x:.5f}<extra>one seed</extra>",
    marker: { size: 7, color: seeds.map(s => fade(s[2], 0.45)) }, showlegend: false });
  traces.push({ x: rows.map(r => r.mean), y: names, mode: "markers", type: "scatter", showlegend: false,
    marker: { size: 10, symbol: "diamond", color: rows.map(r => r.color) },
    error_x: { type: "data", symmetric: false, color: css("--soft"), thickness: 1.4, width: 5,
      array: rows.map(r => r.high === null ? 0 : r.high - r.mean), arrayminus: rows.map(r => r.low === null ? 0 : r.mean - r.low) },
    hovertemplate: "%{x:.5f}<extra>%{y}, mean</extra>" });
  Plotly.react(id, traces, layout({
    height: 70 + 30 * rows.length, xaxis: { title: { text: text(spec.metric) } },
    yaxis: { autorange: "reversed", type: "category", tickfont: { size: 12 } }, margin: { l: 20, r: 16, t: 6, b: 48 },
  }), CONFIG);
}

// ---- a search's trials in their order

function search(id, spec) {
  const dots = whole => spec.points.filter(p => p.whole === whole);
  const marks = (points, name, color) => ({ x: points.map(p => p.x), y: points.map(p => p.y), name, mode: "markers",
    type: "scatter", marker: { size: 6, color }, hovertemplate: "%{y:.5f}<extra>trial %{x}</extra>" });
  const traces = [marks(dots(true), "trained to the end", css("--accent"))];
  if (dots(false).length) traces.push(marks(dots(false), "a shorter piece", fade(QUIET, 0.6)));
  if (spec.best.x.length > 1) traces.push({ x: spec.best.x, y: spec.best.y, name: "best trial so far", mode: "lines",
    type: "scatter", line: { shape: "hv", color: css("--ink"), width: 1.6 }, hoverinfo: "skip" });
  Plotly.react(id, traces, layout({ height: 320, xaxis: { title: { text: "trial" } },
    yaxis: { title: { text: text(spec.metric) } }, legend: { orientation: "h", y: -0.25 } }), CONFIG);
}

// ---- Pareto fronts

function fronts(id, spec) {
  spec.points.sort((a, b) => a.front - b.front);  // what is on the front lies above what is not
  const on = spec.points.filter(p => p.front).sort((a, b) => a.x - b.x);
  const traces = [];
  if (on.length) traces.push({ x: on.map(p => p.x), y: on.map(p => p.y), mode: "lines", type: "scatter", hoverinfo: "skip",
    line: { color: css("--soft"), width: 1.4, dash: "dot", shape: "hv" }, showlegend: false });
  traces.push({ x: spec.points.map(p => p.x), y: spec.points.map(p => p.y), mode: "markers+text", type: "scatter",
    text: spec.points.map(p => p.front || spec.points.length <= 8 ? p.letter : ""), textposition: "middle right", textfont: { size: 11 }, showlegend: false,
    customdata: spec.points.map(p => text(p.name)), hovertemplate: "%{customdata}<br>%{x:.4s}, %{y:.5f}<extra></extra>",
    error_y: { type: "data", symmetric: false, array: spec.points.map(p => p.high === null ? 0 : p.high - p.y),
      arrayminus: spec.points.map(p => p.low === null ? 0 : p.y - p.low), color: css("--none"), thickness: 1, width: 3 },
    marker: { size: 10, color: spec.points.map(p => p.front ? p.color : css("--card")),
      line: { width: 2, color: spec.points.map(p => p.color) } } });
  const xs = spec.points.map(p => p.x), low = Math.min(...xs), high = Math.max(...xs);
  const range = high - low > 1e-3 * Math.abs(high) ? undefined : [0.9 * low, 1.1 * high];  // all cost the same
  Plotly.react(id, traces, layout({ height: 320, xaxis: { title: { text: text(spec.name) }, range },
    yaxis: { title: { text: text(spec.metric) } }, margin: { l: 60, r: 12, t: 10, b: 44 } }), CONFIG);
}

// ---- settings

function coordinates(id, spec) {
  const dimensions = spec.dimensions.map(d => {
    const out = { label: text(d.name), values: d.values };
    if (d.ticks) { out.tickvals = d.ticks; out.ticktext = d.words.map(text); }
    if (d.range) out.range = d.range;
    return out;
  });
  const trace = { type: "parcoords", dimensions, labelfont: { color: css("--ink"), size: 13 },
    tickfont: { color: css("--ink"), size: 11.5 }, rangefont: { color: "rgba(0,0,0,0)" },
    line: { color: spec.color, colorscale: [[0, "#3b78f0"], [0.5, "#c0a24f"], [1, "#e4472e"]], reversescale: spec.mode === "max", showscale: true,
      colorbar: { title: { text: text(spec.metric), side: "right" }, thickness: 12, outlinewidth: 0 } },
    unselected: { line: { color: css("--none"), opacity: 0.12 } } };
  Plotly.react(id, [trace], layout({ height: 420, margin: { l: 70, r: 40, t: 50, b: 24 } }),
    Object.assign({}, CONFIG, { displayModeBar: false }));
}

function importance(id, spec) {
  const rows = spec.rows;
  Plotly.react(id, [{ type: "bar", orientation: "h", x: rows.map(r => r.size), y: rows.map(r => text(r.name)),
    marker: { color: rows.map(r => r.shown ? css("--accent") : fade(css("--none"), 0.5)) },
    error_x: { type: "data", symmetric: false, array: rows.map(r => r.high === null ? 0 : r.high - r.size),
      arrayminus: rows.map(r => r.low === null ? 0 : r.size - r.low), color: css("--ink"), thickness: 1.3, width: 4 },
    hovertemplate: "%{x:.4g}<extra>%{y}</extra>" }],
  layout({ height: 80 + 30 * rows.length, xaxis: { title: { text: text(spec.what) }, zeroline: true },
    yaxis: { autorange: "reversed", type: "category" }, margin: { l: 20, r: 16, t: 6, b: 44 }, bargap: 0.45 }), CONFIG);
}

// ---- all of them, again when a button is pressed or the scheme changes

const DRAW = { curves, finals, search, fronts, coordinates, importance };

function draw(only) {
  for (const [id, spec] of Object.entries(DATA.plots))
    if (place(id) && (!only || spec.kind === only)) DRAW[spec.kind](id, spec);
}

document.querySelectorAll(".buttons button").forEach(button => button.addEventListener("click", () => {
  const { key, value } = button.dataset;
  state[key] = key === "figure" ? Number(value) : key === "log" ? !state.log : value;
  document.querySelectorAll(`.buttons button[data-key="${key}"]`).forEach(b =>
    b.setAttribute("aria-pressed", key === "log" ? String(state.log) : String(b === button)));
  draw("curves");
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
draw();
