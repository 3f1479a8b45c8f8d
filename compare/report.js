"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  data.points = data.points.map((row) => Object.fromEntries(data.columns.map((name, i) => [name, row[i]])));
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const HUES = [25, 255, 310, 150, 75, 200]; // a family each; in grey, dashes, markers and names tell lines apart
  const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
  const MARKS = [
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7z", "M0-5 5 0 0 5-5 0z", "M0-4.5 4.5 3.5h-9z", "M0 4.5-4.5-3.5h9z",
    "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z", "M-4-2.2-2.2-4 0-1.8 2.2-4 4-2.2 1.8 0 4 2.2 2.2 4 0 1.8-2.2 4-4 2.2-1.8 0z",
    "M0-5 1.5-1.5 5-1.5 2.2 .8 3.2 4.5 0 2.3-3.2 4.5-2.2 .8-5-1.5-1.5-1.5z",
  ];

  /** An element with attributes and children; text is text, never markup. */
  function make(name, attributes = {}, ...children) {
    const drawn = ["svg", "g", "line", "path", "polyline", "circle", "text", "title"].includes(name);
    const node = drawn ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === true) node.setAttribute(key, "");
      else if (value !== false && value !== null) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  /** Three digits and a prefix: 0.0123, 1.34 k, 102 M. */
  function short(value) {
    let prefix = "";
    for (const larger of "kMGTP") {
      if (value < 999.5) break;
      value /= 1000;
      prefix = larger;
    }
    return `${Number(value.toPrecision(3))}${prefix && "\u00a0" + prefix}`;
  }
  const whole = (n) => n.toLocaleString("en");
  const withUnit = (value, unit) => (value === 0 ? "0" : short(value)) + (/\s\S$/.test(short(value)) ? "" : "\u00a0") + unit;

  // ---- what is chosen
  const chosen = { kind: data.kinds[0]?.id, phase: null, quantity: null, shown: new Set(data.shown) };
  const quantityOf = (id) => data.quantities.find((q) => q.id === id);
  const has = (kind, phase, quantity) =>
    data.points.some((p) => p.kind === kind && p.phase === phase && p[quantity] > 0);

  const isOf = (name) => data.points.some((p) => p.subject === name && p.kind === chosen.kind);

  function settle() {
    const phases = data.phases.filter((f) => data.quantities.some((q) => has(chosen.kind, f.id, q.id)));
    if (!phases.some((f) => f.id === chosen.phase)) chosen.phase = phases[0]?.id;
    const quantities = data.quantities.filter((q) => has(chosen.kind, chosen.phase, q.id));
    if (!quantities.some((q) => q.id === chosen.quantity)) chosen.quantity = quantities[0]?.id;
  }

  function radios(name, legend, options, usable) {
    const group = make("fieldset", {}, make("legend", {}, legend));
    for (const { id, name: text } of options) {
      const input = make("input", { type: "radio", name, value: id, checked: chosen[name] === id, disabled: !usable(id) });
      input.addEventListener("change", () => {
        chosen[name] = id;
        refresh();
        byId("choice").querySelector(`[name=${name}]:checked`).focus();
      });
      group.append(make("label", {}, input, text));
    }
    return group;
  }

  function controls() {
    const any = (kind, phase) => data.quantities.some((q) => has(kind, phase, q.id));
    const groups = [
      radios("phase", "Phase", data.phases, (id) => any(chosen.kind, id)),
      radios("quantity", "Figure", data.quantities, (id) => has(chosen.kind, chosen.phase, id)),
    ];
    if (data.kinds.length > 1) groups.unshift(radios("kind", "Of", data.kinds, () => true));
    byId("choice").replaceChildren(...groups);
  }

  // ---- how a subject looks, the same in every chart
  const looks = new Map();
  data.families.forEach(({ members }, f) => {
    const others = members.filter((name) => name !== data.reference);
    if (others.length < members.length) members.splice(0, members.length, data.reference, ...others);
    others.forEach((name, i) => looks.set(name, {
      dash: DASHES[i % DASHES.length], mark: MARKS[i % MARKS.length],
      style: `--hue: ${HUES[f % HUES.length]}; --rank: ${i / Math.max(others.length - 1, 1)}`,
    }));
  });
  looks.set(data.reference, { dash: "", mark: null, style: "", dense: true });

  function line(name, attributes = {}) {
    const look = looks.get(name);
    return make("g", { class: look.dense ? "line dense" : "line", style: look.style, ...attributes });
  }

  function sample(name) {
    const look = looks.get(name), group = line(name);
    group.append(make("polyline", { points: "2,7 36,7", "stroke-dasharray": look.dash }));
    if (look.mark) group.append(make("path", { class: "mark", d: look.mark, transform: "translate(19 7)" }));
    return make("svg", { viewBox: "0 0 38 14", "aria-hidden": "true" }, group);
  }

  function subjects() {
    const box = byId("subjects"), boxes = new Map(), heads = [];
    const all = data.families.flatMap((f) => f.members);
    const update = () => {
      for (const [name, input] of boxes) input.checked = chosen.shown.has(name);
      for (const { input, members } of heads) {
        const count = members.filter((name) => chosen.shown.has(name)).length;
        input.checked = count === members.length;
        input.indeterminate = count > 0 && count < members.length;
      }
      chart();
    };
    const show = (names, on) => {
      for (const name of names) on ? chosen.shown.add(name) : chosen.shown.delete(name);
      update();
    };
    const button = (text, names) => {
      const made = make("button", { type: "button" }, text);
      made.addEventListener("click", () => { chosen.shown.clear(); show(names, true); });
      return made;
    };
    box.append(make("div", { class: "buttons" }, button("all", all), button("none", []), button("a few", data.shown)));
    for (const { name: family, members } of data.families) {
      const head = make("input", { type: "checkbox" });
      head.addEventListener("change", () => show(members, head.checked));
      heads.push({ input: head, members });
      const group = make("fieldset", {}, make("legend", {}, make("label", {}, head, family)));
      for (const name of members) {
        const input = make("input", { type: "checkbox", value: name });
        input.addEventListener("change", () => show([name], input.checked));
        boxes.set(name, input);
        group.append(make("label", {}, input, sample(name), name));
      }
      box.append(group);
    }
    update();
  }

  // ---- the chart
  let drawn = []; // of each line shown: name, its group, its points with their places

  function ticks(low, high) {
    const steps = Math.log10(high / low) < 2.5 ? [1, 2, 5] : [1], found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const step of steps) if (step * 10 ** e >= low && step * 10 ** e <= high) found.push(step * 10 ** e);
    }
    return found;
  }

  function chart() {
    const plot = byId("plot"), quantity = quantityOf(chosen.quantity), phase = data.phases.find((f) => f.id === chosen.phase);
    leave();
    plot.replaceChildren();
    drawn = [];
    const names = [...looks.keys()].filter((name) => chosen.shown.has(name) && isOf(name));
    const mine = data.points.filter((p) => p.kind === chosen.kind && p.phase === chosen.phase && chosen.shown.has(p.subject));
    const points = mine.filter((p) => p[chosen.quantity] > 0);
    const caption = quantity ? `${phase.title}: ${quantity.title}` : "No figures";
    byId("caption").textContent = caption;
    plot.setAttribute("aria-label", `${caption}, against ${phase.across}, both axes logarithmic; ${names.join(", ")}`);
    missing(mine, names);
    if (!points.length) {
      plot.setAttribute("viewBox", "0 0 400 60");
      plot.append(make("text", { x: 10, y: 35 }, names.length ? "None of the chosen has such a figure." : "Choose what to draw."));
      return;
    }
    const width = Math.max(plot.clientWidth || plot.parentNode.clientWidth, 320);
    const longest = Math.max(...names.map((name) => name.length));
    const left = 62, right = Math.min(24 + 7 * longest, 0.4 * width), top = 12, bottom = 46;
    const height = Math.max(Math.min(0.62 * width, 600), 340, 15 * names.length + top + bottom);
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const lengths = [...new Set(points.map((p) => p.tokens))].sort((a, b) => a - b);
    const values = points.map((p) => p[chosen.quantity]);
    const scale = (low, high, from, to) => (v) => from + (to - from) * (Math.log(v / low) / Math.log(high / low));
    const least = Math.min(...values) / 1.3, most = Math.max(...values) * 1.3;
    const x = scale(lengths[0] / 1.1, lengths.at(-1) * 1.1, left, width - right), y = scale(least, most, height - bottom, top);

    const each = Math.ceil((lengths.length * 58) / (width - left - right));
    lengths.forEach((n, i) => {
      if (i % each) return;
      plot.append(make("g", { class: "tick" }, make("line", { x1: x(n), x2: x(n), y1: top, y2: height - bottom }),
        make("text", { x: x(n), y: height - bottom + 17, "text-anchor": "middle" }, whole(n))));
    });
    for (const v of ticks(least, most)) {
      plot.append(make("g", { class: "tick" }, make("line", { x1: left, x2: width - right, y1: y(v), y2: y(v) }),
        make("text", { x: left - 7, y: y(v) + 4, "text-anchor": "end" }, short(v))));
    }
    plot.append(make("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }),
      make("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, phase.across),
      make("text", { x: 13, y: (top + height - bottom) / 2, "text-anchor": "middle",
        transform: `rotate(-90 13 ${(top + height - bottom) / 2})` }, quantity.unit));

    for (const name of names) {
      const own = points.filter((p) => p.subject === name).sort((a, b) => a.tokens - b.tokens);
      if (!own.length) continue;
      const look = looks.get(name), group = line(name, { "data-subject": name });
      const places = own.map((point) => ({ point, x: x(point.tokens), y: y(point[chosen.quantity]) }));
      group.append(make("polyline", { points: places.map((p) => `${p.x.toFixed(1)},${p.y.toFixed(1)}`).join(" "),
        "stroke-dasharray": look.dash }));
      for (const p of look.mark ? places : []) {
        group.append(make("path", { class: "mark", d: look.mark, transform: `translate(${p.x.toFixed(1)} ${p.y.toFixed(1)})` }));
      }
      plot.append(group);
      drawn.push({ name, group, places });
    }
    nameEnds(width - right, top, height - bottom, Math.floor((right - 20) / 6.6));
    plot.append(make("circle", { id: "ring", r: 8, visibility: "hidden" }));
  }

  /** Places as near as can be to those wanted, which ascend: so far apart, and between low and high. */
  function apart(wanted, spacing, low, high) {
    const pools = []; // neighbours that would overlap stay together: where their first is, how many
    wanted.forEach((place, i) => {
      let mean = place - i * spacing, count = 1;
      while (pools.length && pools.at(-1)[0] > mean) {
        const [other, more] = pools.pop();
        mean = (mean * count + other * more) / (count + more);
        count += more;
      }
      pools.push([mean, count]);
    });
    const most = Math.max(high - (wanted.length - 1) * spacing, low);
    const firsts = pools.flatMap(([mean, count]) => Array(count).fill(Math.min(Math.max(mean, low), most)));
    return firsts.map((first, i) => first + i * spacing);
  }

  /** Names right of the lines' ends, moved apart where they would cover each other. */
  function nameEnds(edge, top, bottom, letters) {
    const ends = drawn.map((d) => ({ ...d, end: d.places.at(-1) })).sort((a, b) => a.end.y - b.end.y);
    const furthest = Math.max(...ends.map((e) => e.end.x));
    const places = apart(ends.map((e) => e.end.y), 15, top, bottom);
    ends.forEach(({ name, group, end }, i) => {
      const text = name.length > letters ? name.slice(0, Math.max(letters - 1, 1)) + "\u2026" : name;
      group.append(make("path", { class: end.x < furthest - 1 ? "leader early" : "leader", d: `M${end.x} ${end.y}L${edge + 12} ${places[i]}` }),
        make("text", { x: edge + 15, y: places[i] + 4 }, text, make("title", {}, name)));
    });
  }

  function missing(mine, names) {
    const without = new Map(); // the first length without a time, and why
    if (chosen.quantity === "ms") {
      for (const p of mine.filter((q) => q.ms === null && q.note).sort((a, b) => a.tokens - b.tokens)) {
        const why = `from ${whole(p.tokens)} tokens: ${p.note}`;
        if (![...without.values()].flat().includes(p.subject)) without.set(why, [...(without.get(why) ?? []), p.subject]);
      }
    }
    const said = [...without].map(([why, subjects]) => `${names.filter((name) => subjects.includes(name)).join(", ")} ${why}`);
    byId("missing").textContent = said.length ? `No time: ${said.join("; ")}.` : "";
  }

  // ---- one point, by pointer or keys
  let at = null; // indices into drawn and its places

  function leave() {
    at = null;
    byId("plot").classList.remove("lit");
    drawn.forEach((d) => d.group.classList.remove("on"));
    byId("ring")?.setAttribute("visibility", "hidden");
    byId("tip").hidden = true;
  }

  function visit(i, j, aloud) {
    leave();
    at = [i, j];
    const { name, group, places } = drawn[i], { point, x, y } = places[j];
    const quantity = quantityOf(chosen.quantity), value = point[chosen.quantity];
    const plot = byId("plot"), tip = byId("tip");
    plot.classList.add("lit");
    group.classList.add("on");
    const ring = byId("ring");
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    ring.setAttribute("visibility", "visible");
    const said = [`${whole(point.tokens)} tokens: ${withUnit(value, quantity.short)}`];
    if (quantity.id === "ms" && point.low_ms !== null && point.high_ms !== null) {
      said.push(`quartiles ${short(point.low_ms)} to ${short(point.high_ms)} ms`);
    }
    const dense = data.points.find((p) => p.subject === data.reference && p.kind === point.kind && p.phase === point.phase && p.tokens === point.tokens);
    if (dense && name !== data.reference && dense[quantity.id] > 0) said.push(`${short(value / dense[quantity.id])} \u00d7 ${data.reference}`);
    tip.replaceChildren(make("b", {}, name), ...said.flatMap((text, k) => (k ? [make("br"), text] : [text])));
    tip.hidden = false;
    const ratio = plot.clientWidth / plot.viewBox.baseVal.width;
    const across = plot.offsetLeft || plot.getBoundingClientRect().left - plot.parentNode.getBoundingClientRect().left;
    const down = plot.getBoundingClientRect().top - plot.parentNode.getBoundingClientRect().top;
    const leftOf = x * ratio > plot.clientWidth / 2;
    tip.style.left = `${Math.max(0, across + x * ratio + (leftOf ? -14 - tip.offsetWidth : 14))}px`;
    tip.style.top = `${down + Math.max(0, y * ratio - tip.offsetHeight - 8)}px`;
    if (aloud) byId("live").textContent = [name, ...said].join(", ");
  }

  function hover(event) {
    const plot = byId("plot"), box = plot.getBoundingClientRect(), ratio = box.width / plot.viewBox.baseVal.width;
    const px = (event.clientX - box.left) / ratio, py = (event.clientY - box.top) / ratio;
    let best = 45, found = null;
    drawn.forEach((d, i) => d.places.forEach((p, j) => {
      const far = Math.hypot(p.x - px, p.y - py);
      if (far < best) [best, found] = [far, [i, j]];
    }));
    if (event.target.closest?.(".line text")) {
      const i = drawn.findIndex((d) => d.group === event.target.closest(".line"));
      found = [i, drawn[i].places.length - 1];
    }
    found ? visit(...found, false) : leave();
  }

  function keys(event) {
    if (event.key === "Escape") return leave();
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
    if (!step || !drawn.length) return;
    event.preventDefault();
    if (!at) return visit(0, drawn[0].places.length - 1, true);
    let [i, j] = at;
    if (step[1]) return visit(i, Math.min(Math.max(j + step[1], 0), drawn[i].places.length - 1), true);
    const order = drawn.map((d, k) => [d.places.at(-1).y, k]).sort((a, b) => b[0] - a[0]).map(([, k]) => k);
    i = order[(order.indexOf(i) + step[0] + order.length) % order.length];
    visit(i, Math.min(j, drawn[i].places.length - 1), true);
  }

  /** Only what was measured of the chosen kind can be chosen. */
  function offer() {
    for (const input of byId("subjects").querySelectorAll("input[value]")) {
      input.parentNode.hidden = !isOf(input.value);
    }
    for (const group of byId("subjects").querySelectorAll("fieldset")) {
      group.hidden = !group.querySelector(":scope > label:not([hidden])");
    }
  }

  function refresh() {
    settle();
    controls();
    offer();
    chart();
  }

  // ---- tables
  function sortable(table) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    const value = (row, i) => {
      const cell = row.cells[i];
      if (cell.classList.contains("none")) return null;
      return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
    };
    heads.forEach((head, i) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [value(row, i), row]);
        rows.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null); // what has no figure comes last
          return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  function filtered(table) {
    const input = make("input", { type: "search" });
    table.closest(".wide").before(make("label", { class: "filter" }, "Only rows with", input));
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
  }

  document.querySelectorAll("table").forEach(sortable);
  document.querySelectorAll("table.long").forEach(filtered);
  if (data.points.length) {
    for (const id of ["choice", "figure", "subjects"]) byId(id).hidden = false;
    settle();
    controls();
    subjects();
    offer();
    const plot = byId("plot");
    plot.addEventListener("pointermove", hover);
    plot.addEventListener("pointerdown", hover);
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("keydown", keys);
    plot.addEventListener("blur", leave);
    let width = plot.clientWidth;
    new ResizeObserver(() => {
      if (plot.clientWidth !== width) {
        width = plot.clientWidth;
        chart();
      }
    }).observe(plot);
  }
})();
