"use strict";
// Coloured tokens, the likely tokens of a step under the pointer, heatmap and bars. Text goes in as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const tip = document.getElementById("tip");
  let mode = data.mode;

  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const place = (kind, i) => document.querySelector(`.${kind}[data-of="${i}"]`);
  const mix = (a, b, t) => a.map((x, j) => Math.round(x + (b[j] - x) * t));
  const rgb = (value) => {
    const at = Math.min(1, Math.max(0, value)) * (data.stops.length - 1);
    const i = Math.min(Math.floor(at), data.stops.length - 2);
    return `rgb(${mix(data.stops[i], data.stops[i + 1], at - i)})`;
  };
  const shade = (p) => `rgb(${mix([250, 250, 248], [31, 78, 150], Math.sqrt(p))})`;
  const shown = (name) => name.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

  function bars(into, i, step, head) {
    const token = data.all[i].tokens[step];
    const before = data.all[i].tokens.slice(Math.max(0, step - 10), step).map((t) => shown(t.name)).join("");
    into.replaceChildren(
      make("div", "caption", head),
      make("div", "caption", `after … ${before || shown(data.all[i].prompt.slice(-40))}`),
      ...token.top.map(([name, p, q, drawn]) => {
        const row = make("div", drawn ? "bar drawn" : "bar");
        const track = make("div", "track");
        const [one, two] = [make("div", "p"), make("div", "q")];
        one.style.width = `${100 * p}%`;
        two.style.width = `${100 * q}%`;
        if (!q) two.hidden = true;
        track.append(one, ...(q ? [two] : []));
        row.append(make("b", "", shown(name)), track, make("span", "figure", `${p.toFixed(4)} → ${q.toFixed(4)}`));
        return row;
      }),
    );
  }
  const words = (t, step) =>
    `step ${step + 1}: ${shown(t.name)}   p ${t.p}, rank ${t.rank}, ${t.above} above it, ${t.nats} nats; ` +
    `entropy ${t.entropy} nats, logit ${t.logit}, cosine ${t.cosine}; drawn with ${t.drawn} from ${t.kept}`;

  function choose(i, step) {
    for (const node of document.querySelectorAll(`#c${i} .chosen`)) node.classList.remove("chosen");
    for (const node of document.querySelectorAll(`#c${i} [data-step="${step}"]`)) node.classList.add("chosen");
    bars(place("bars", i), i, step, words(data.all[i].tokens[step], step));
  }
  function point(node, i, step) {
    bars(tip, i, step, words(data.all[i].tokens[step], step));
    tip.hidden = false;
    const at = node.getBoundingClientRect();
    const left = Math.min(at.left, window.innerWidth - tip.offsetWidth - 8);
    const below = at.bottom + 6 + tip.offsetHeight < window.innerHeight;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - tip.offsetHeight - 6)}px`;
  }
  function listen(node, i, step) {
    node.dataset.step = step;
    node.addEventListener("pointerenter", () => point(node, i, step));
    node.addEventListener("pointerleave", () => (tip.hidden = true));
    node.addEventListener("click", () => choose(i, step));
  }

  function text(i) {
    const into = place("text", i), one = data.all[i];
    into.replaceChildren(make("span", "prompt", one.prompt));
    one.tokens.forEach((t, step) => {
      const node = make("span", t.text ? "t" : "t part", t.text.replace(/\n/g, "↵\n"));
      node.tabIndex = 0;
      listen(node, i, step);
      node.addEventListener("focus", () => { choose(i, step); point(node, i, step); });
      node.addEventListener("blur", () => (tip.hidden = true));
      node.addEventListener("keydown", (event) => {
        const next = { ArrowRight: node.nextSibling, ArrowLeft: node.previousSibling }[event.key];
        if (next && next.dataset.step !== undefined) { next.focus(); event.preventDefault(); }
      });
      into.append(node);
    });
  }
  function paint(i) {
    const one = data.all[i], scale = place("scale", i), bar = make("i");
    bar.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(rgb)})`;
    scale.replaceChildren(one.scale[mode][0], bar, one.scale[mode][1]);
    for (const node of place("text", i).querySelectorAll(".t")) {
      const value = one.tokens[node.dataset.step].value[mode];
      node.style.background = value === null ? "" : rgb(value);
      node.classList.toggle("coloured", value !== null);
    }
  }
  function map(i) {
    const into = place("map", i), one = data.all[i];
    into.style.gridTemplateRows = `repeat(${data.k + 2}, 17px)`;
    one.tokens.forEach((t, step) => {
      const head = make("span", "n", step + 1);
      listen(head, i, step);
      into.append(head);
      for (let j = 0; j <= data.k; j++) {
        const node = make("span", "");
        if (j < t.top.length) {
          const [name, p, , drawn] = t.top[j];
          node.textContent = shown(name).slice(0, 7);
          node.style.background = shade(p);
          node.style.color = p > 0.3 ? "#fff" : "#181a1e";
          if (drawn) node.className = "drawn";
          node.addEventListener("pointerenter", () => point(node, i, step));
          node.addEventListener("pointerleave", () => (tip.hidden = true));
          node.addEventListener("click", () => choose(i, step));
        }
        into.append(node);
      }
    });
  }
  function line(i) {
    const tokens = data.all[i].tokens, width = 1000, height = 180;
    const ys = tokens.map((t) => t.logit), low = Math.min(...ys), high = Math.max(...ys);
    const x = (n) => 46 + ((width - 56) * n) / Math.max(1, tokens.length - 1);
    const y = (v) => height - 20 - ((height - 34) * (v - low)) / (high - low || 1);
    const draw = (name, attributes, content) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      if (content !== undefined) node.textContent = content;
      return node;
    };
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
    for (const v of [low, high])
      svg.append(draw("text", { x: 40, y: y(v) + 4, "text-anchor": "end", "font-size": 12, fill: "var(--soft)" }, v.toFixed(1)));
    svg.append(draw("polyline", { points: ys.map((v, n) => `${x(n)},${y(v)}`).join(" "), fill: "none", stroke: "var(--accent)", "stroke-width": 1.5 }));
    ys.forEach((v, n) => {
      const dot = draw("circle", { cx: x(n), cy: y(v), r: 3, fill: "var(--accent)" });
      dot.addEventListener("pointerenter", () => point(dot, i, n));
      dot.addEventListener("pointerleave", () => (tip.hidden = true));
      svg.append(dot);
    });
    place("line", i).append(svg);
  }

  data.all.forEach((one, i) => {
    text(i);
    paint(i);
    if (!one.tokens.length) return;
    map(i);
    line(i);
    choose(i, 0);
  });
  for (const button of document.querySelectorAll('button[data-key="mode"]'))
    button.addEventListener("click", () => {
      mode = button.dataset.value;
      for (const other of document.querySelectorAll('button[data-key="mode"]'))
        other.setAttribute("aria-pressed", String(other === button));
      data.all.forEach((_, i) => paint(i));
    });
})();
